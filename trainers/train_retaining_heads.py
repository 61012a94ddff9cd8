r"""Train retaining heads, which say of every token of a prompt how much it will be needed (Locret, arXiv 2410.01805).

The embedded model, in a few minutes on one CPU core:

    python -m hf_kvcache.trainers.train_retaining_heads --prompt-tokens 1024 --answer-tokens 256 \
        --max-steps 600 --warmup-steps 50 --learning-rate 5e-3 --out heads

With `--target reconstruction`, whose steps take more than twice as long, `--max-steps 300` is enough.

A model of your own, with the settings of the paper:

    accelerate launch -m hf_kvcache.trainers.train_retaining_heads --model ID_OR_PATH --data long_alpaca.json \
        --d-r 1024 --bf16 --out heads

On a CPU, where the model takes most of the time, with few prompts that are read once and learned from many times:

    python -m hf_kvcache.trainers.train_retaining_heads --model smollm2 --data books/train --prompt-tokens 768 \
        --recorded 200 --target answer_weight --max-steps 2000 --learning-rate 2e-3 --bf16 --out heads

The model is frozen. Every step runs one prompt and what follows it through the model's own attention, and the heads of
all layers learn from the queries, keys and values of the prompt what the queries after it made of its keys. The output
is a PEFT adapter with the heads; `training.json` beside it says how good they are on text that was held out.
Stop at any time and go on with `--resume`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments
from transformers.hf_argparser import HfArg

from hf_kvcache.adapters import RetainingHeads, attach
from hf_kvcache.adapters.scoring import score
from hf_kvcache.calibration.agreement import agreement, overlap
from hf_kvcache.calibration.conversations import Conversations, read_rows
from hf_kvcache.calibration.judging import TARGETS, Text, judge
from hf_kvcache.calibration.prompts import Arrange, request_to_repeat
from hf_kvcache.calibration.recorded import Recorded, joined
from hf_kvcache.calibration.synthetic import Synthetic
from hf_kvcache.models import embedded_prose
from hf_kvcache.trainers.common import (
    Models,
    PartsTrainer,
    Steps,
    load_model,
    parser_of,
    train,
    training_arguments,
    write_report,
)
from hf_kvcache.trainers.dmc_data import load_stream

JUDGED_BY = {"answer_max": "answer", "answer_weight": "answer", "causal": "prompt", "reconstruction": "repeat"}


@dataclass
class Prompts(Models):
    """What to train on."""

    _argument_group_name: ClassVar[str] = "model and prompts"
    data: Path = HfArg(
        default=embedded_prose(),
        help="conversations as .json or .jsonl, {'instruction', 'output'} or {'conversations': [{'from', "
        "'value'}]}; or a plain text, or a folder of .txt files, in which facts are hidden and asked for; the embedded "
        "prose unless given",
    )
    rows: int = HfArg(default=5000, help="conversations to use, drawn at random")
    prompt_tokens: int = HfArg(default=10240, help="tokens of a prompt; longer ones lose their middle")
    answer_tokens: int = HfArg(default=512, help="most tokens of an answer")
    recorded: int = HfArg(
        default=0,
        help="prompts that the model reads once, all of them before the first step, and heads learn from in turns; 0 "
        "reads a new one at every step. Takes disk: a token of a model of 30 layers with 960 channels of queries, keys "
        "and values 58 KB in bfloat16",
    )
    recordings: Path | None = HfArg(default=None, help="folder for them, with --recorded; unless given in --out")
    prose_share: float = HfArg(default=0.5, help="of prompts made of text, the share without facts")
    valid_share: float = HfArg(default=0.2, help="share of a text, at its end, that is held out")
    valid_prompts: int = HfArg(default=16, help="held-out prompts to evaluate on")
    budget: int = HfArg(default=0, help="tokens to keep at evaluation; 0 is an eighth of the prompt")
    n_recent: int = HfArg(default=100, help="last tokens of a prompt that are kept beside them")


@dataclass
class Heads:
    """Which heads, and what they learn."""

    _argument_group_name: ClassVar[str] = "heads"
    target: Literal["answer_max", "answer_weight", "causal", "reconstruction"] = HfArg(
        default="answer_max",
        help="the largest score that the answer gives a token (Locret); the log of the largest attention weight that "
        "it gives it; the largest score that later tokens of the same prompt give it (ours, for text without answers); "
        "the log of the largest attention weight that repeating the prompt gives it (KVzip, KVzap)",
    )
    d_r: int = HfArg(default=256, help="width of the hidden layer; the paper has 1024, to little effect")
    query_aware: bool = HfArg(default=False, help="put the question before the prompt, too (Locret-Q)")
    n_query: int = HfArg(default=64, help="last tokens of the question to put there")


@dataclass
class Optimisation(Steps):
    """How to train; the defaults are the paper's."""

    max_steps: int = HfArg(default=3000, help="optimiser steps")
    warmup_steps: int | None = HfArg(default=None, help="of them warm-up; two thirds unless given")
    learning_rate: float = HfArg(default=5e-4, help="at its peak; falls to zero linearly")
    weight_decay: float = HfArg(default=0.01, help="of AdamW")
    clip_value: float = HfArg(default=0.5, help="gradients are cut to this, entry by entry; 0 leaves them")
    alpha: float = HfArg(default=0.0025, help="weight of the difference between neighbours' scores")
    seed: int = HfArg(default=42, help="of weights, prompts and their order")

    @property
    def n_warmup(self) -> int:
        """Warm-up steps: the paper's 2000 of 3000, unless given."""
        return round(self.max_steps * 2 / 3) if self.warmup_steps is None else self.warmup_steps


def retaining_loss(
    predicted: dict[int, torch.Tensor], target: dict[int, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """SmoothL1 between scores and targets, and `alpha` times how much scores of neighbours differ.

    The first is a mean over layers, heads and tokens, the second a mean within layers that is added up over them, as
    in the paper's code. Tokens whose target is not finite do not count.

    Args:
        predicted, target (dict[int, torch.Tensor]):
            by layer, float32 `[B, Hkv, T]`.

    Returns:
        `loss`, and its parts `regression` and `smoothness`.
    """
    regression, smoothness = [], []
    for i, scores in predicted.items():
        is_real = target[i].isfinite()
        regression.append(F.smooth_l1_loss(scores[is_real], target[i][is_real]))
        pairs = is_real[..., 1:] & is_real[..., :-1]
        smoothness.append((scores[..., 1:] - scores[..., :-1])[pairs].square().mean())
    parts = {"regression": torch.stack(regression).mean(), "smoothness": torch.stack(smoothness).sum()}
    return {"loss": parts["regression"] + alpha * parts["smoothness"], **parts}


class HeadsInTraining(nn.Module):
    """The retaining heads of all layers, and the frozen model that they are trained for.

    Args:
        model: has `heads` attached, which shows what heads are fed with.
        heads: to start from.
        target: key of `TARGETS`.
        alpha: see `retaining_loss`.
    """

    def __init__(self, model: nn.Module, heads: RetainingHeads, target: str, alpha: float):
        super().__init__()
        self.fc1 = nn.ParameterDict({str(i): nn.Parameter(fc1.float().clone()) for i, (fc1, _) in heads.layers.items()})
        self.fc2 = nn.ParameterDict({str(i): nn.Parameter(fc2.float().clone()) for i, (_, fc2) in heads.layers.items()})
        # not a submodule: neither trained, nor synchronised, nor saved with the checkpoints
        self.__dict__["model"] = model.requires_grad_(False).eval()
        self.activation, self.target, self.alpha = heads.activation, target, alpha

    @property
    def layers(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Weights by layer, as `RetainingHeads` holds them."""
        return {int(i): (fc1.detach().cpu(), self.fc2[i].detach().cpu()) for i, fc1 in self.fc1.items()}

    def scores(self, features: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """By layer, float32 `[B, Hkv, T]` from `[B, T, F]`."""
        return {i: score(x, self.fc1[str(i)], self.fc2[str(i)], self.activation) for i, x in features.items()}

    def forward(self, features=None, target=None, **text) -> dict[str, torch.Tensor]:
        """Losses of a `Text`, given by its fields, or of what was recorded of one, and how well the best tenth of the
        tokens was found.
        """
        if features is None:
            said, features = judge(self.model, Text(**text), {"target": TARGETS[self.target]})
            target = said["target"]
        scores = self.scores(features)
        with torch.no_grad():
            found = torch.stack([overlap(scores[i], target[i]).mean() for i in scores]).mean()
        return retaining_loss(scores, target, self.alpha) | {"overlap": found}


class ClipValue(TrainerCallback):
    """Clip gradients entry by entry."""

    def __init__(self, parameters, value: float):
        self.parameters, self.value = list(parameters), value

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.value > 0:
            nn.utils.clip_grad_value_(self.parameters, self.value)


def load_prompts(options: Prompts, heads: Heads, seed: int, tokenizer, n_items: int) -> tuple:
    """Prompts to train on, and held-out ones.

    Raises:
        ValueError: there are too few.
    """
    rows = read_rows(options.data)
    sizes = options.prompt_tokens, options.answer_tokens
    if rows is not None:
        order = np.random.default_rng(seed).permutation(len(rows))[: options.rows + options.valid_prompts]
        rows = [rows[i] for i in order]
        n_valid = min(options.valid_prompts, len(rows) // 2)
        if not n_valid:
            raise ValueError(f"{options.data}: {len(rows)} conversations are too few, some are held out")
        return Conversations(rows[n_valid:], tokenizer, *sizes), Conversations(rows[:n_valid], tokenizer, *sizes)
    stream = load_stream(options.data, tokenizer, (n_items + options.valid_prompts) * sum(sizes))
    # what ends a text would end a turn
    stream = stream[stream != tokenizer.eos_token_id]
    n_train = int(len(stream) * (1 - options.valid_share))
    more = options.prose_share, heads.n_query if heads.query_aware else 0
    windows = Synthetic(tokenizer, stream[:n_train], *sizes, *more, n_items, seed)
    return windows, Synthetic(tokenizer, stream[n_train:], *sizes, *more, options.valid_prompts, seed + 1)


def record(model, prompts, arrange: Arrange, options: Prompts, heads: Heads, optimisation, arguments, n_items: int):
    """The prompts as a dataset of what the model made of them; those that are not on disk are read now."""
    judged_by = JUDGED_BY[heads.target]
    names = [name for name, by in JUDGED_BY.items() if by == judged_by]
    sizes = {name: getattr(options, name) for name in ("prompt_tokens", "answer_tokens", "prose_share", "valid_share")}
    about = {"model": model.name_or_path, "dtype": model.dtype, "data": options.data, "judged_by": judged_by, **sizes}
    about |= {"n_query": arrange.n_query, "seed": optimisation.seed, "rows": options.rows}
    folder = options.recordings or options.out / "recorded"
    recorded = Recorded(folder, min(options.recorded, len(prompts)), n_items, about, [heads.target], optimisation.seed)
    share = arguments.process_index, arguments.world_size
    judges = {name: TARGETS[name] for name in names}
    every = max(options.recorded // 20, 1)
    shown = lambda i: print(f"recording {i} of {recorded.n}", flush=True) if i % every == 0 else None  # noqa: E731
    recorded.record(model, prompts, arrange, judges, share, shown)
    PartialState().wait_for_everyone()
    return recorded


def arguments_of(out: Path, optimisation: Optimisation) -> TrainingArguments:
    return training_arguments(
        out,
        optimisation,
        max_steps=optimisation.max_steps,
        learning_rate=optimisation.learning_rate,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=optimisation.weight_decay,
        lr_scheduler_type="linear",
        warmup_steps=optimisation.n_warmup,
        # entries are clipped instead: `ClipValue`
        max_grad_norm=0.0,
    )


def main(args: list[str] | None = None) -> dict[str, float]:
    """Train and save; returns what `agreement` does on held-out prompts, and the seconds that training took."""
    parser = parser_of(__doc__, Prompts, Heads, Optimisation)
    options, chosen, optimisation = parser.parse_args_into_dataclasses(args)
    arguments = arguments_of(options.out, optimisation)

    model, tokenizer = load_model(options.model, options.attn, optimisation, arguments)
    n_items = optimisation.max_steps * optimisation.batch_size * optimisation.accumulation * arguments.world_size
    prompts, held_out = load_prompts(options, chosen, optimisation.seed, tokenizer, options.recorded or n_items)
    layout = {
        "request": request_to_repeat(tokenizer),
        "bos": tokenizer.bos_token_id,
        "n_query": chosen.n_query if chosen.query_aware else 0,
    }
    arrange = Arrange(JUDGED_BY[chosen.target], **layout)

    aware = {"query_aware": True, "n_query": chosen.n_query} if chosen.query_aware else {}
    made_for = {"local": options.n_recent} | ({"budget": options.budget} if options.budget else {})
    heads = RetainingHeads.new(model, chosen.d_r, optimisation.seed, target=chosen.target, defaults=made_for, **aware)
    attach(model, heads)
    trained = HeadsInTraining(model, heads, chosen.target, optimisation.alpha)
    collate = lambda batch: dict(vars(arrange(batch)))  # noqa: E731
    if options.recorded:
        prompts = record(model, prompts, arrange, options, chosen, optimisation, arguments, n_items)
        collate = partial(joined, target=chosen.target)
    trainer = PartsTrainer(
        model=trained,
        args=arguments,
        train_dataset=prompts,
        data_collator=collate,
        callbacks=[ClipValue(trained.parameters(), optimisation.clip_value)],
    )
    seconds = train(trainer, optimisation.resume)

    to_answer, kept = Arrange("answer", **layout), (options.budget, options.n_recent)
    scores = agreement(model, trained.scores, TARGETS[chosen.target], held_out, arrange, to_answer, *kept)
    scores["seconds"] = seconds
    if trainer.is_world_process_zero():
        replace(heads, layers=trained.layers).save(options.out, model)
        write_report(options.out, {"held out": scores}, trainer, options, chosen, optimisation)
        print(json.dumps(scores))
    return scores


if __name__ == "__main__":
    main()
