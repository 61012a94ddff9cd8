"""What trainers share: options, the Trainer's arguments, models, texts, and what is logged and written at the end."""

from __future__ import annotations

import json
import time
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments
from transformers.hf_argparser import HfArg

from hf_kvcache.models import embedded_model, resolve


@dataclass
class Models:
    """The model, and where the result goes."""

    out: Path = HfArg(help="folder for the result and the checkpoints")
    model: str = HfArg(default=str(embedded_model()), help="name or path; the embedded model unless given")
    attn: str = HfArg(default="sdpa", help="attention implementation of the model")


@dataclass
class Steps:
    """How to train."""

    _argument_group_name: ClassVar[str] = "optimisation"
    batch_size: int = HfArg(default=1, help="items (windows, prompts or sequences) per device and batch")
    accumulation: int = HfArg(default=1, help="batches whose gradients are added")
    bf16: bool = HfArg(default=False, help="the model in bfloat16; what is added to it stays in float32")
    logging_steps: int = HfArg(default=10, help="steps between log lines")
    save_steps: int = HfArg(default=250, help="steps between checkpoints")
    seed: int = HfArg(default=0, help="of all that is drawn")
    resume: bool = HfArg(default=False, help="go on from the last checkpoint in the output folder")


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Commands stay as they are written."""


def parser_of(description: str, *options: type) -> HfArgumentParser:
    """A parser of the fields of dataclasses."""
    return HfArgumentParser(options, description=description, formatter_class=_Help)


def training_arguments(out: Path, options, **more) -> TrainingArguments:
    """Arguments of a Trainer that leaves checkpoints in `out`, and takes the items of its dataset one after another.

    Args:
        out: folder of the result.
        options: with `bf16`, `save_steps` and `seed`.
        more: what is to be different, or added.
    """
    own = {
        "output_dir": str(out / "checkpoints"),
        "train_sampling_strategy": "sequential",
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": options.bf16,
        "save_steps": options.save_steps,
        "save_total_limit": 2,
        "report_to": "none",
        "remove_unused_columns": False,
        "seed": options.seed,
    }
    if isinstance(options, Steps):
        own["per_device_train_batch_size"] = options.batch_size
        own["gradient_accumulation_steps"] = options.accumulation
        own["logging_steps"] = options.logging_steps
    arguments = TrainingArguments(**own | more)
    # several devices are for `accelerate launch`
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def load_model(name: str, attn: str, options: Steps, arguments: TrainingArguments):
    """A model that stays as it is, on its device, in bfloat16 or float32, and its tokenizer."""
    name, dtype = resolve(name), torch.bfloat16 if options.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attn)
    return model.to(arguments.device), AutoTokenizer.from_pretrained(name)


def read_texts(data: Path) -> list[str]:
    """A text file, or all .txt files of a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(data.glob("*.txt")) if data.is_dir() else [data]
    if not files:
        raise FileNotFoundError(f"no .txt files in {data}")
    return [file.read_text(encoding="utf-8") for file in files]


def place_of(i: int, n: int) -> int:
    """Where the `i`-th window of a stream begins that has `n` places."""
    # multiples of the golden ratio cover the stream evenly at any number of steps
    return int(i * 0.6180339887498949 % 1 * n)


class PartsTrainer(Trainer):
    """Trainer of small parts beside a frozen model; their module returns its loss, and parts of it that are logged.

    Raises:
        ValueError: the run was launched with FSDP, which would shard the small parts.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = defaultdict(list)
        # the loss is a mean per batch, not a sum over tokens
        self.model_accepts_loss_kwargs = False
        if self.is_fsdp_enabled:
            raise ValueError(
                "only small parts beside a frozen model are trained, and FSDP would shard those alone: launch it with "
                "trainers/configs/ddp.yaml"
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        for name, value in outputs.items():
            if name != "loss":
                self.parts[name].append(value.detach())
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs |= {name: round(torch.stack(values).mean().item(), 4) for name, values in self.parts.items()}
            self.parts.clear()
        super().log(logs, *args, **kwargs)


def train(trainer: Trainer, resume: bool) -> float:
    """Train, and save the Trainer's state; the seconds that it took."""
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=resume)
    seconds = round(time.monotonic() - start, 1)
    trainer.save_state()
    return seconds


def write_report(out: Path, report: dict, trainer: Trainer, *options) -> None:
    """Write `training.json`: what is known of a run, to which its options are added, and its log."""
    report["settings"] = {name: value for own in options for name, value in asdict(own).items()}
    text = json.dumps(report | {"log": trainer.state.log_history}, indent=1, default=str)
    (out / "training.json").write_text(text + "\n", encoding="utf-8")
