r"""Retrofit a model so that it decides which tokens keep a row of the cache: merged (DMC) or dropped (DMS).

Dynamic memory compression, Nawrot et al. 2024 (arXiv 2403.09636); dynamic memory sparsification, Lancucki et al. 2025
(arXiv 2506.05345). The embedded model, on one or two CPU cores:

    python -m hf_kvcache.trainers.train_dmc --method dmc --ratio 4 --data books/train --out small-dmc
    python -m hf_kvcache.trainers.train_dmc --method dms --window 16 --ratio 4 --data books/train --out small-dms

A model of your own, with settings of the papers' order of size:

    accelerate launch -m hf_kvcache.trainers.train_dmc --model ID_OR_PATH --data texts --method dms --ratio 8 \
        --window 256 --sequence 4096 --batch-size 1 --accumulation 16 --lr 3e-5 --final-lr 3e-6 --ramp-steps 700 \
        --bf16 --gradient-checkpointing --out model-dms

Three phases. Attention learns to do without the channel that decisions are read from (a borrowed one, or one whose
rows are replaced); then the compression ratio that a hinge loss asks for rises to `--ratio`; then it stays there, and
the learning rate falls. What a step does depends on its number alone: stop at any time and go on with `--resume`.
A model that is retrofitted already goes on from `--start-ratio`. `--method none` is the control: the same steps on the
same tokens without compression. `training.json` beside the model has the log, and how much every head compresses.
"""

from __future__ import annotations

import copy
import json
import time
import warnings
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_kvcache.adapters import dmc_files
from hf_kvcache.adapters.capture import has_norms
from hf_kvcache.adapters.modules import attentions
from hf_kvcache.dmc.files import load, save
from hf_kvcache.dmc.objective import divergence, hinge, merged_share, ramp
from hf_kvcache.dmc.retrofit import compression_off, draw_noise, retrofit, retrofits, zero_rows
from hf_kvcache.dmc.settings import Settings
from hf_kvcache.eval.retrieval import Ledger
from hf_kvcache.models import embedded_model, embedded_prose
from hf_kvcache.trainers.pretrain_small import LedgerMix

CHARACTERS = 8  # of text per token to be read, twice what a token has
LORA_FILE = "adapter_model.safetensors"
LOSS_ELEMENTS = 2**24  # logits whose loss is computed at a time


@dataclass
class Texts:
    """What to train, on what."""

    _argument_group_name: ClassVar[str] = "model and text"
    out: Path = field(metadata={"help": "folder for the model and the checkpoints"})
    model: str = field(
        default=str(embedded_model()),
        metadata={"help": "name or path, of a retrofitted model, too; the embedded model unless given"},
    )
    attn: str = field(default="sdpa", metadata={"help": "attention implementation of the model"})
    data: Path = field(
        default=embedded_prose(),
        metadata={"help": "a text file, or a folder of .txt files; the embedded prose unless given"},
    )
    sequence: int = field(default=512, metadata={"help": "tokens of a sequence"})
    prose_share: float = field(
        default=0.25, metadata={"help": "share of sequences without a ledger, if the tokenizer has one"}
    )
    answer_weight: float = field(default=1.0, metadata={"help": "weight of the mean loss on answers, with a ledger"})
    skip_eos: bool = field(default=False, metadata={"help": "no loss on predicting the end of a text"})


@dataclass
class Method:
    """How the model is to decide; what is not given is as in `--model` where that is retrofitted already."""

    _argument_group_name: ClassVar[str] = "method"
    method: Literal["dmc", "dms", "none"] = field(
        default="dmc", metadata={"help": "merge tokens, drop tokens, or neither: the control run"}
    )
    decision: Literal["borrowed", "rows", "linear"] | None = field(
        default=None,
        metadata={
            "help": "read decisions from a channel of keys and queries (borrowed: the default), from rows of their own "
            "that replace that channel, or from rows of their own beside it (linear: the default with --adapter)"
        },
    )
    ratio: float = field(default=4.0, metadata={"help": "compression ratio to reach, tokens per row"})
    start_ratio: float = field(default=1.0, metadata={"help": "where the ramp begins"})
    window: int | None = field(
        default=None,
        metadata={"help": "newest members that a merged row is the mean of, 0 for all (dmc: 12); or tokens that a "
        "dropped one stays visible for (dms: 256)"},
    )  # fmt: skip
    scale: float | None = field(
        default=None, metadata={"help": "of decision logits (dmc: 20, dms: 100); more learns to compress sooner"}
    )
    offset: float | None = field(default=None, metadata={"help": "subtracted from decision logits (5)"})
    tau: float | None = field(default=None, metadata={"help": "temperature of relaxed decisions (0.1)"})
    neuron: int | None = field(default=None, metadata={"help": "channel that is borrowed or replaced (-1, the last)"})
    zero_after_rope: bool | None = field(
        default=None, metadata={"help": "do without that channel after RoPE, too, as the released code (false)"}
    )
    per: Literal["head", "layer"] | None = field(
        default=None, metadata={"help": "who decides: every KV head, or a layer for all of its own (head)"}
    )
    constant_ratio: bool = field(
        default=False, metadata={"help": "ask every head for the ratio (DMC-C), instead of all together"}
    )
    loss: Literal["ce", "kd"] | None = field(
        default=None,
        metadata={
            "help": "cross-entropy (default of dmc), or distillation from the model without compression (of dms)"
        },
    )
    kd_direction: Literal["reverse", "forward"] = field(
        default="reverse", metadata={"help": "KL(student || teacher), or KL(teacher || student)"}
    )
    teacher: Literal["start", "self"] | None = field(
        default=None,
        metadata={
            "help": "what is distilled: a copy of the model as it was (default), or the same weights without "
            "compression, as the released code, which may drift where they are trained (default of bare --adapter)"
        },
    )
    hinge_weight: float = field(default=1.0, metadata={"help": "weight of the loss that asks for the ratio"})
    adapter: bool = field(default=False, metadata={"help": "leave the model's own weights as they are"})
    lora_rank: int = field(default=0, metadata={"help": "rank of LoRA on q, k, v, o projections, with --adapter"})


@dataclass
class Optimisation:
    """How to train; the defaults suit the embedded model."""

    _argument_group_name: ClassVar[str] = "optimisation"
    zero_steps: int | None = field(
        default=None, metadata={"help": "steps to take a channel out; 60 where one is taken out, unless given"}
    )
    ramp_steps: int = field(default=400, metadata={"help": "steps of the rising ratio"})
    solid_steps: int = field(default=100, metadata={"help": "steps at the ratio, the learning rate falling"})
    lr: float = field(default=5e-4, metadata={"help": "learning rate; 3e-5 for models of billions of weights"})
    final_lr: float = field(default=5e-5, metadata={"help": "learning rate at the end, by a cosine"})
    decision_lr_factor: float = field(
        default=10.0, metadata={"help": "times the learning rate for rows of decisions (rows, linear)"}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "of AdamW; none for decisions"})
    batch_size: int = field(default=8, metadata={"help": "sequences per device and batch"})
    accumulation: int = field(default=1, metadata={"help": "batches whose gradients are added"})
    clip_norm: float = field(default=1.0, metadata={"help": "largest norm of a gradient; 0 leaves them"})
    bf16: bool = field(default=False, metadata={"help": "bfloat16 autocast over float32 weights"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute layers to save memory"})
    logging_steps: int = field(default=10, metadata={"help": "steps between log lines"})
    save_steps: int = field(default=250, metadata={"help": "steps between checkpoints; 0 for none"})
    save_dtype: Literal["source", "float32", "bfloat16"] = field(
        default="source", metadata={"help": "of the weights that are saved; source: as they came"}
    )
    seed: int = field(default=0, metadata={"help": "of sequences and noise"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in --out"})


# -- what a step does --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """What holds during one step.

    Attributes:
        fade: factor on the channel that is taken out.
        compresses: whether decisions count.
        ratio: compression ratio that is asked for.
        lr: factor on the learning rate.
    """

    fade: float
    compresses: bool
    ratio: float
    lr: float


@dataclass(frozen=True)
class Schedule:
    """The three phases; what a step does is a function of its number."""

    zero_steps: int
    ramp_steps: int
    solid_steps: int
    start_ratio: float
    ratio: float
    final_lr: float  # as a share of the first

    @property
    def n_steps(self) -> int:
        return self.zero_steps + self.ramp_steps + self.solid_steps

    @property
    def end_of_ramp(self) -> int:
        return self.zero_steps + self.ramp_steps

    def at(self, step: int) -> Moment:
        if step < self.zero_steps:
            # gone after 80 % of the phase, so that the rest is learned without it
            return Moment(max(0.0, 1 - step / (0.8 * self.zero_steps)), False, 1.0, 1.0)
        ratio = ramp(step - self.zero_steps, self.ramp_steps, self.ratio, self.start_ratio)
        done = min(1.0, max(0, step - self.end_of_ramp) / max(1, self.solid_steps))
        lr = self.final_lr + (1 - self.final_lr) * (1 + np.cos(np.pi * done)) / 2
        return Moment(0.0, True, ratio, float(lr))


class Conduct(TrainerCallback):
    """Puts the model in the state of its step; sees that the ends of phases are logged."""

    def __init__(self, model, schedule: Schedule, whole=nullcontext):
        self.model, self.schedule, self.whole = model, schedule, whole

    def on_step_begin(self, args, state, control, **kwargs):
        now = self.schedule.at(state.global_step)
        for child in retrofits(self.model).values():
            child.fade, child.compresses = now.fade, now.compresses

    def on_step_end(self, args, state, control, **kwargs):
        # before the checkpoint of this step is written
        if state.global_step == self.schedule.zero_steps:
            is_borrowed = [c.settings.decision == "borrowed" for c in retrofits(self.model).values()]
            if is_borrowed and all(is_borrowed):
                with self.whole():
                    zero_rows(self.model)
        if state.global_step in (self.schedule.end_of_ramp, self.schedule.n_steps):
            control.should_log = True


class RetrofitTrainer(Trainer):
    """Trainer whose loss is language modelling or distillation, and the hinge; logs what every layer compresses."""

    def __init__(self, schedule: Schedule, method: Method, optimisation: Optimisation, teacher=None, **kwargs):
        super().__init__(**kwargs)
        self.teacher = teacher if teacher is None else teacher.to(self.args.device)
        self.schedule, self.method, self.optimisation = schedule, method, optimisation
        self.parts = defaultdict(list)
        self.shares: torch.Tensor | None = None
        self._micro = (-1, 0)
        # the loss is a mean per batch, not a sum over tokens
        self.model_accepts_loss_kwargs = False
        self.add_callback(Conduct(self.model, schedule, self.whole))

    @contextmanager
    def whole(self):
        """Weights as they are without FSDP."""
        if not self.is_fsdp_enabled:
            yield
            return
        from torch.distributed.fsdp import FullyShardedDataParallel

        if not isinstance(self.model_wrapped, FullyShardedDataParallel):
            raise ValueError("rows cannot be zeroed under FSDP 2: use fsdp_version 1, or --decision rows or linear")
        with FullyShardedDataParallel.summon_full_params(self.model_wrapped):
            yield

    def _seed(self) -> int:
        """Of the noise of this batch: the same whether processes share batches or one has them in turn."""
        step, n = self._micro
        step, n = (self.state.global_step, n + 1) if step == self.state.global_step else (self.state.global_step, 0)
        self._micro = step, n
        index = n * self.args.world_size + self.args.process_index
        return int(np.random.SeedSequence([self.optimisation.seed, step, index]).generate_state(1)[0])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        own = self.accelerator.unwrap_model(model)
        ids, labels, weights = inputs["input_ids"], inputs["labels"].flatten(), inputs["weights"].flatten()
        now, children = self.schedule.at(self.state.global_step), retrofits(own)
        draw_noise(own, *ids.shape, self._seed(), ids.device)
        if self.method.loss == "kd":
            with teaching(own), torch.no_grad():
                teacher = (self.teacher or model)(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        outputs = model(input_ids=ids, use_cache=False)
        logits = outputs.logits.flatten(0, 1)  # [B * T, vocabulary]
        if self.method.loss == "kd":
            loss = by_rows(lambda s, t: divergence(s, t, self.method.kd_direction), weights, logits, teacher)
            with torch.no_grad():
                # not trained on, but it shows whether a teacher leads astray
                self.parts["ce"].append(by_rows(cross_entropy, weights, logits, labels))
        else:
            loss = by_rows(cross_entropy, weights, logits, labels)
        self.parts[self.method.loss].append(loss.detach())
        if children and now.compresses:
            calls = {i: child.call for i, child in children.items()}
            behind = hinge(merged_share(calls), now.ratio, self.method.constant_ratio)
            self.parts["hinge"].append(behind.detach())
            self.parts["shares"].append(torch.stack([hard_share(call) for call in calls.values()]))
            loss = loss + self.method.hinge_weight * behind
        elif children:
            # DDP waits for the gradient of every weight
            loss = loss + 0.0 * sum(w.sum() for child in children.values() for w in child.parameters())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.parts:
            means = {
                name: self.accelerator.gather(torch.stack(values).mean(0)[None]).mean(0)
                for name, values in self.parts.items()
            }
            self.parts.clear()
            self.shares = means.pop("shares", None)
            logs |= {name: round(mean.item(), 4) for name, mean in means.items()}
            if self.shares is not None:
                logs |= {
                    "target": round(self.schedule.at(self.state.global_step - 1).ratio, 3),
                    "ratio": ratio_of(self.shares),
                    "ratio_by_layer": [ratio_of(share) for share in self.shares],
                }
                self._warn(logs)
        super().log(logs, *args, **kwargs)

    def _warn(self, logs) -> None:
        """Say so when the ramp is over and nothing has happened."""
        if self.state.global_step == self.schedule.end_of_ramp and self.schedule.ratio > 1.5 and logs["ratio"] < 1.1:
            scale = next(iter(retrofits(self.model).values())).settings.scale
            warnings.warn(
                f"the ramp is over and asks for {self.schedule.ratio:g} tokens per row, but the model keeps "
                f"{logs['ratio']:g}: decisions get next to no gradient; raise --scale (it is {scale:g}), "
                "--hinge-weight or the number of steps",
                stacklevel=2,
            )

    def create_optimizer(self, model=None):
        """AdamW; rows of decisions learn faster, and without decay."""
        if self.optimizer is None:
            model, lr = self.model if model is None else model, self.args.learning_rate
            named = {name: p for name, p in model.named_parameters() if p.requires_grad}
            deciding = [p for name, p in named.items() if is_decision(name)]
            others = [p for name, p in named.items() if not is_decision(name)]
            groups = [
                {"params": [p for p in others if p.dim() > 1], "weight_decay": self.args.weight_decay},
                {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
                {"params": deciding, "weight_decay": 0.0, "lr": lr * self.optimisation.decision_lr_factor},
            ]
            betas = self.args.adam_beta1, self.args.adam_beta2
            self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule.at(step).lr)
        return self.lr_scheduler


def is_decision(name: str) -> bool:
    """Whether a parameter is one of those that decide."""
    return ".kv_dmc." in name


@contextmanager
def teaching(model):
    """The same weights without compression, and with the channel that is being taken out."""
    children = list(retrofits(model).values())
    fades = [child.fade for child in children]
    with compression_off(model):
        for child in children:
            # afterwards the channel is gone for the teacher, too
            child.fade = float(child.fade > 0)
        try:
            yield
        finally:
            for child, fade in zip(children, fades):
                child.fade = fade


def by_rows(losses, weights: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
    """Weighted sum of losses of rows, so many at a time that their float32 copies fit memory.

    Args:
        losses: of some rows, `[n]`.
        weights: `[N]`.
        rows: what it takes, logits first, `[N, ...]`.
    """
    n = max(1, LOSS_ELEMENTS // rows[0].shape[-1])
    if len(weights) <= n:
        return (losses(*rows) * weights).sum()
    parts = zip(*(x.split(n) for x in (weights, *rows)), strict=True)
    return sum((checkpoint(losses, *part, use_reentrant=False) * w).sum() for w, *part in parts)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Float32 `[N]`."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


@torch.no_grad()
def hard_share(call) -> torch.Tensor:
    """Share of real tokens that inference would not keep, by head, `[Hkv]`."""
    alpha = call.alpha.float()
    if call.is_real is None:
        return alpha.mean((0, 2))
    real = call.is_real.unsqueeze(1).float()
    return (alpha * real).sum((0, 2)) / real.sum().clamp(min=1)


def ratio_of(share: torch.Tensor) -> float:
    """Tokens per row, where a share of the tokens has none."""
    return round(1 / max(1e-4, 1 - share.mean().item()), 3)


# -- model -------------------------------------------------------------------------------------------------------------


def check(method: Method, optimisation: Optimisation) -> None:
    """Refuse options that contradict each other, and fill in what depends on others.

    Raises:
        ValueError: they do.
    """
    has_none = method.method == "none"
    method.loss = method.loss or ("kd" if method.method == "dms" else "ce")
    if has_none and method.loss == "kd":
        raise ValueError("--method none with --loss kd has nothing to learn: student and teacher are the same")
    if has_none and method.adapter:
        raise ValueError("--method none with --adapter has nothing to train")
    if method.loss != "kd" and method.teacher:
        raise ValueError(f"--teacher is for --loss kd, and this is {method.loss}")
    if not method.teacher:
        method.teacher = "self" if method.adapter and not method.lora_rank else "start"
    if not 1 <= method.start_ratio <= method.ratio:
        raise ValueError(f"--start-ratio {method.start_ratio:g} must lie between 1 and --ratio {method.ratio:g}")
    if method.adapter and method.decision == "borrowed":
        raise ValueError(
            "--adapter leaves the weights that borrowed decisions come from: use --decision rows or linear"
        )
    if has_none:
        ignored = [k for k in settings_of(method) if k != "method"]
        if ignored:
            raise ValueError(f"--method none compresses nothing: it has no {', '.join(ignored)}")
    if method.lora_rank and not method.adapter:
        raise ValueError("--lora-rank is for --adapter; without it all weights are trained")
    if optimisation.ramp_steps + optimisation.solid_steps <= 0:
        raise ValueError("--ramp-steps and --solid-steps are both 0: nothing would be compressed")


def teacher_of(model, method: Method):
    """A copy of a model as it is, without compression; None where the same weights teach."""
    if method.loss != "kd" or method.teacher == "self":
        return None
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    for child in retrofits(teacher).values():
        child.compresses = False
    return teacher


def settings_of(method: Method) -> dict:
    """The settings that were given."""
    names = ("method", "decision", "window", "scale", "offset", "tau", "neuron", "zero_after_rope", "per")
    return {name: getattr(method, name) for name in names if getattr(method, name) is not None}


def prepare(model, method: Method, optimisation: Optimisation) -> None:
    """Retrofit a model, or see that it is retrofitted as asked for; say which weights are trained; count steps.

    Raises:
        ValueError: it is retrofitted otherwise, or cannot be.
    """
    children, given = retrofits(model), settings_of(method)
    is_new = not children
    if method.method == "none":
        if children:
            raise ValueError("--method none is for a model that is not retrofitted, and this one is")
    elif is_new:
        if method.adapter:
            given.setdefault("decision", "linear")
        children = retrofit(model, Settings(**given))
    has = next(iter(children.values())).settings if children else None
    if has is not None:
        differing = [f"{k} is {getattr(has, k)!r}, not {v!r}" for k, v in given.items() if getattr(has, k) != v]
        if differing:
            raise ValueError(f"the model was retrofitted with other settings: {'; '.join(differing)}")
    if is_new and has is not None and has.decision == "borrowed":
        if any(has_norms(attention.module) for attention in attentions(model).values()):
            raise ValueError(
                "this model normalises queries and keys, so that no row of its weights can be zeroed to start from "
                "keeping everything; use --decision linear"
            )
    if method.adapter:
        if method.lora_rank:
            from peft import LoraConfig, inject_adapter_in_model

            rank, sides = method.lora_rank, ["q_proj", "k_proj", "v_proj", "o_proj"]
            lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=sides, task_type="CAUSAL_LM")
            inject_adapter_in_model(lora, model, "lora")
        for name, p in model.named_parameters():
            p.requires_grad_(is_decision(name) or "lora_" in name)
            if p.requires_grad:
                p.data = p.data.float()
    # the control run goes through all phases
    takes_out = is_new and (has is None or has.ablates) and not (method.adapter and not method.lora_rank)
    if optimisation.zero_steps is None:
        optimisation.zero_steps = 60 if takes_out else 0
    if optimisation.zero_steps and not takes_out:
        raise ValueError("--zero-steps: there is no channel to take out, or nothing that could learn to do without it")


# -- data --------------------------------------------------------------------------------------------------------------


class Windows(torch.utils.data.Dataset):
    """Item `i` is a whole batch: packed windows of a stream of tokens, spread evenly, the same whenever asked for."""

    def __init__(self, stream: np.ndarray, length: int, n_rows: int, n: int, bos: int | None, skip: int | None):
        self.stream, self.length, self.n_rows, self.n, self.bos, self.skip = stream, length, n_rows, n, bos, skip

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(np.stack([self.row(i * self.n_rows + j) for j in range(self.n_rows)]))
        labels = ids[:, 1:]
        counts = torch.ones_like(labels) if self.skip is None else labels != self.skip
        return {"input_ids": ids[:, :-1], "labels": labels, "weights": counts.float() / counts.sum().clamp(min=1)}

    def row(self, i: int) -> np.ndarray:
        """`length + 1` token ids, so that `length` of them can be predicted."""
        # multiples of the golden ratio cover the stream evenly at any number of steps
        start = int(i * 0.6180339887498949 % 1 * (len(self.stream) - self.length))
        ids = self.stream[start : start + self.length + 1].astype(np.int64)
        return ids if self.bos is None else np.concatenate([[self.bos], ids[:-1]])


@dataclass
class MixOptions:
    """What `LedgerMix` asks for."""

    steps: int
    curriculum: list[str]
    tokens_per_batch: int
    prose_share: float
    answer_weight: float
    seed: int


class Mix(LedgerMix):
    """`LedgerMix`, optionally without loss on the end of a text."""

    def __init__(self, stream, ledger, options: MixOptions, skip: int | None):
        super().__init__(stream, ledger, options)
        self.skip = skip

    def weigh(self, ids):
        batch = super().weigh(ids)
        if self.skip is not None:
            batch["weights"] = batch["weights"] * (batch["labels"] != self.skip)
        return batch


def load_stream(data: Path, tokenizer, n_tokens: int) -> np.ndarray:
    """A file, or all .txt files of a folder, as one stream of token ids `[n]`, the end marked after each.

    Args:
        n_tokens: that will be read; of longer texts, the middle of every file is enough.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(data.glob("*.txt")) if data.is_dir() else [data]
    if not files:
        raise FileNotFoundError(f"no .txt files in {data}")
    texts = [file.read_text(encoding="utf-8") for file in files]
    share = min(1.0, CHARACTERS * n_tokens / max(1, sum(map(len, texts))))
    cuts = [(len(text) - int(len(text) * share)) // 2 for text in texts]
    texts = [text[cut : len(text) - cut] for text, cut in zip(texts, cuts, strict=True)]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.array([*text, *end], dtype=np.int32) for text in ids])


def load_batches(texts: Texts, optimisation: Optimisation, tokenizer, n_steps: int, world_size: int):
    """A dataset whose item is a batch: windows of text, most with a ledger where the tokenizer has one.

    Raises:
        ValueError: the text is too short.
    """
    rows, n_items = optimisation.batch_size, n_steps * optimisation.accumulation
    stream = load_stream(texts.data, tokenizer, n_items * world_size * rows * texts.sequence)
    if len(stream) <= texts.sequence:
        raise ValueError(f"{texts.data} has {len(stream)} tokens, a sequence needs {texts.sequence + 1}")
    skip = tokenizer.eos_token_id if texts.skip_eos else None
    try:
        ledger = Ledger.from_tokenizer(tokenizer)
    except ValueError:
        return Windows(stream, texts.sequence, rows, n_items * world_size, tokenizer.bos_token_id, skip)
    sizes = [f"{texts.sequence}x0"], rows * texts.sequence, texts.prose_share, texts.answer_weight
    return Mix(stream, ledger, MixOptions(n_items, *sizes, optimisation.seed), skip)


# -- main --------------------------------------------------------------------------------------------------------------


def training_arguments(out: Path, optimisation: Optimisation, n_steps: int) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=n_steps,
        # an item of the dataset is a batch already
        per_device_train_batch_size=1,
        gradient_accumulation_steps=optimisation.accumulation,
        train_sampling_strategy="sequential",
        learning_rate=optimisation.lr,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=optimisation.weight_decay,
        max_grad_norm=optimisation.clip_norm,
        use_cpu=not torch.accelerator.is_available(),
        bf16=optimisation.bf16,
        activation_checkpointing=optimisation.gradient_checkpointing,
        # reentrant checkpointing would cut decisions off from their gradient
        activation_checkpointing_kwargs={"use_reentrant": False} if optimisation.gradient_checkpointing else None,
        save_strategy="steps" if optimisation.save_steps else "no",
        save_steps=optimisation.save_steps or 500,
        save_total_limit=2,
        # all weights have a gradient at every step, see `RetrofitTrainer.compute_loss`
        ddp_find_unused_parameters=False,
        logging_steps=optimisation.logging_steps,
        report_to="none",
        remove_unused_columns=False,
        seed=optimisation.seed,
    )
    # several devices are for `accelerate launch`
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Commands stay as they are written."""


def main(args: list[str] | None = None) -> dict:
    """Train and save; returns what `training.json` says."""
    parser = HfArgumentParser((Texts, Method, Optimisation), description=__doc__, formatter_class=_Help)
    texts, method, optimisation = parser.parse_args_into_dataclasses(args)
    check(method, optimisation)

    model, dtype = load_model(texts.model, texts.attn, keeps_dtype=method.adapter and optimisation.bf16)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    teacher = teacher_of(model, method)
    prepare(model, method, optimisation)
    schedule = Schedule(
        optimisation.zero_steps,
        optimisation.ramp_steps,
        optimisation.solid_steps,
        method.start_ratio,
        method.ratio,
        optimisation.final_lr / optimisation.lr,
    )
    arguments = training_arguments(texts.out, optimisation, schedule.n_steps)
    batches = load_batches(texts, optimisation, tokenizer, schedule.n_steps, arguments.world_size)

    trainer = RetrofitTrainer(
        schedule=schedule,
        method=method,
        optimisation=optimisation,
        teacher=teacher,
        model=model,
        args=arguments,
        train_dataset=batches,
        data_collator=lambda items: items[0],
    )
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=optimisation.resume)
    seconds = round(time.monotonic() - start, 1)
    trainer.save_state()

    tokens = schedule.n_steps * texts.sequence * optimisation.batch_size * optimisation.accumulation
    report = {"seconds": seconds, "tokens": tokens * arguments.world_size}
    if trainer.shares is not None:
        report |= {"ratio": ratio_of(trainer.shares), "target": method.ratio}
        report["shares"] = [[round(share, 4) for share in layer] for layer in trainer.shares.tolist()]
    model = trained_model(trainer, texts, method, optimisation)
    if model is not None:
        wanted = {"source": dtype, "float32": torch.float32, "bfloat16": torch.bfloat16}[optimisation.save_dtype]
        save_model(model, wanted, texts.out, tokenizer, method.adapter, report)
        report["settings"] = asdict(texts) | asdict(method) | asdict(optimisation)
        text = json.dumps(report | {"log": trainer.state.log_history}, indent=1, default=str)
        (texts.out / "training.json").write_text(text + "\n", encoding="utf-8")
        print(json.dumps({name: report[name] for name in ("seconds", "ratio", "shares") if name in report}))
    return report


def load_model(source: str, attn: str, keeps_dtype: bool = False):
    """A model, retrofitted or not, and the dtype that it was saved in.

    Args:
        source: name or path of a model, or the folder of an adapter.
        attn: attention implementation.
        keeps_dtype: float32 otherwise.

    Raises:
        ValueError: an adapter that goes with LoRA.
    """
    tensors = {}
    if (Path(source) / "adapter_config.json").exists():
        if (Path(source) / "lora").exists():
            raise ValueError(f"{source} goes with LoRA, whose training cannot go on here; train from the base model")
        settings, tensors = dmc_files.FORMAT.read(source)
        source = settings["base_model_name_or_path"]
    config, _ = PreTrainedConfig.get_config_dict(source)
    read = load if "kv_dmc" in config else AutoModelForCausalLM.from_pretrained
    model = read(source, dtype="auto", attn_implementation=attn)
    dtype = model.dtype
    if tensors:
        retrofit(model, dmc_files.settings_of(settings, source))
        with torch.no_grad():
            for (i, part), t in tensors.items():
                getattr(retrofits(model)[i], part).copy_(t)
    return model if keeps_dtype else model.float(), dtype


def trained_model(trainer: RetrofitTrainer, texts: Texts, method: Method, optimisation: Optimisation):
    """The model with all its weights; None on processes that need not save it."""
    if not trainer.is_fsdp_enabled:
        return trainer.accelerator.unwrap_model(trainer.model) if trainer.is_world_process_zero() else None
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return None
    model, _ = load_model(texts.model, texts.attn)
    prepare(model, method, optimisation)
    model.load_state_dict(state)
    return model


def save_model(model, dtype: torch.dtype, out: Path, tokenizer, is_adapter: bool, report: dict) -> None:
    """The whole model with what is known of the retrofit; or what has been added to it."""
    # the Trainer turns it off while it trains
    model.config.use_cache = True
    if not retrofits(model):
        model.to(dtype).save_pretrained(out)
        tokenizer.save_pretrained(out)
        return
    facts = {"target_ratio": report["target"], "achieved_ratio": report["ratio"], "tokens_seen": report["tokens"]}
    if not is_adapter:
        save(model.to(dtype), out, tokenizer, **facts)
        return
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    if lora:
        # what PEFT calls weights of the adapter that is loaded
        lora = {f"base_model.model.{name.replace('.lora.weight', '.weight')}": p for name, p in lora.items()}
        config = model.peft_config["lora"]
        config.base_model_name_or_path, config.inference_mode = model.name_or_path, True
        config.save_pretrained(out / "lora")
        save_file({name: p.detach().cpu().contiguous() for name, p in lora.items()}, out / "lora" / LORA_FILE)
    dmc_files.save_adapter(model, out, **facts)


if __name__ == "__main__":
    main()
