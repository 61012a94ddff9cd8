"""What `train_dmc` can be asked for, and what contradicts itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from transformers.hf_argparser import HfArg

from hf_kvcache.models import embedded_prose
from hf_kvcache.trainers.common import Models, Steps


@dataclass
class Texts(Models):
    """What to train, on what."""

    _argument_group_name: ClassVar[str] = "model and text"
    data: Path = HfArg(
        default=embedded_prose(), help="a text file, or a folder of .txt files; the embedded prose unless given"
    )
    sequence: int = HfArg(default=512, help="tokens of a sequence")
    prose_share: float | None = HfArg(
        default=None,
        help="share of sequences that are prose alone; the others have a ledger, if the tokenizer has one, or facts to "
        "be found again, without which a model forgets how to. Unless given 0.25 with a ledger, else 1",
    )
    answer_weight: float = HfArg(default=1.0, help="weight of the mean loss on answers, with a ledger or facts")
    skip_eos: bool = HfArg(default=False, help="no loss on predicting the end of a text")


@dataclass
class Method:
    """How the model is to decide; what is not given is as in `--model` where that is retrofitted already."""

    _argument_group_name: ClassVar[str] = "method"
    method: Literal["dmc", "dms", "none"] = HfArg(
        default="dmc", help="merge tokens, drop tokens, or neither: the control run"
    )
    decision: Literal["borrowed", "rows", "linear"] | None = HfArg(
        default=None,
        help="read decisions from a channel of keys and queries (borrowed: the default), from rows of their own "
        "that replace that channel, or from rows of their own beside it (linear: the default with --adapter)",
    )
    ratio: float = HfArg(default=4.0, help="compression ratio to reach, tokens per row")
    start_ratio: float = HfArg(default=1.0, help="where the ramp begins")
    window: int | None = HfArg(
        default=None,
        help="newest members that a merged row is the mean of, 0 for all (dmc: 12); or tokens that a "
        "dropped one stays visible for (dms: 256)",
    )
    scale: float | None = HfArg(
        default=None, help="of decision logits (dmc: 20, dms: 100); more learns to compress sooner"
    )
    offset: float | None = HfArg(default=None, help="subtracted from decision logits (5)")
    tau: float | None = HfArg(default=None, help="temperature of relaxed decisions (0.1)")
    neuron: int | None = HfArg(default=None, help="channel that is borrowed or replaced (-1, the last)")
    zero_after_rope: bool | None = HfArg(
        default=None, help="do without that channel after RoPE, too, as the released code (false)"
    )
    per: Literal["head", "layer"] | None = HfArg(
        default=None, help="who decides: every KV head, or a layer for all of its own (head)"
    )
    constant_ratio: bool = HfArg(default=False, help="ask every head for the ratio (DMC-C), instead of all together")
    loss: Literal["ce", "kd"] | None = HfArg(
        default=None, help="cross-entropy (default of dmc), or distillation from the model without compression (of dms)"
    )
    kd_direction: Literal["reverse", "forward"] = HfArg(
        default="reverse", help="KL(student || teacher), or KL(teacher || student)"
    )
    teacher: str | None = HfArg(
        default=None,
        help="what is distilled: start, a copy of the model as it was (default); self, the same weights without "
        "compression, as the released code, which may drift where they are trained (default of bare --adapter); or "
        "the name or path of a model: for one that is retrofitted already, the one it came from",
    )
    hinge_weight: float = HfArg(default=1.0, help="weight of the loss that asks for the ratio")
    adapter: bool = HfArg(default=False, help="leave the model's own weights as they are")
    lora_rank: int = HfArg(default=0, help="rank of LoRA on q, k, v, o projections, with --adapter")


@dataclass
class Optimisation(Steps):
    """How to train; the defaults suit the embedded model."""

    _argument_group_name: ClassVar[str] = "optimisation"
    zero_steps: int | None = HfArg(
        default=None, help="steps to take a channel out; 60 where one is taken out, unless given"
    )
    ramp_steps: int = HfArg(default=400, help="steps of the rising ratio")
    solid_steps: int = HfArg(default=100, help="steps at the ratio, the learning rate falling")
    lr: float = HfArg(default=5e-4, help="learning rate; 3e-5 for models of billions of weights")
    final_lr: float = HfArg(default=5e-5, help="learning rate at the end, by a cosine")
    decision_lr_factor: float = HfArg(default=10.0, help="times the learning rate for rows of decisions (rows, linear)")
    weight_decay: float = HfArg(default=0.1, help="of AdamW; none for decisions")
    batch_size: int = HfArg(default=8, help="sequences per device and batch")
    clip_norm: float = HfArg(default=1.0, help="largest norm of a gradient; 0 leaves them")
    bf16: bool = HfArg(default=False, help="bfloat16 autocast over float32 weights")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute layers to save memory")
    save_steps: int = HfArg(default=250, help="steps between checkpoints; 0 for none")
    save_dtype: Literal["source", "float32", "bfloat16"] = HfArg(
        default="source", help="of the weights that are saved; source: as they came"
    )


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


def settings_of(method: Method) -> dict:
    """The settings that were given."""
    names = ("method", "decision", "window", "scale", "offset", "tau", "neuron", "zero_after_rope", "per")
    return {name: getattr(method, name) for name in names if getattr(method, name) is not None}
