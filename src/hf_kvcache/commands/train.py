"""Train what a method adds to a model (retaining heads, low-rank projections), or the model itself (DMC, DMS, GQA).

`hf-kvcache train retaining-heads --help` lists the arguments of a trainer; `accelerate launch -m
hf_kvcache.trainers.train_retaining_heads` runs the same on several processes.
"""

from __future__ import annotations

import argparse
from importlib import import_module

from hf_kvcache.commands import UserError

TRAINERS = {
    "retaining-heads": ("train_retaining_heads", "score tokens for Locret"),
    "projections": ("train_projections", "fine-tune the bases of a low-rank cache"),
    "dmc": ("train_dmc", "retrofit a model that merges (DMC) or drops (DMS) tokens"),
    "decisions": ("fit_decisions", "fit what a model drops (DMS) to recordings, without a step"),
    "gqa": ("convert_gqa", "give a model fewer KV heads, and train it on"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    trainers = parser.add_subparsers(dest="trainer", metavar="TRAINER", required=True, help="what to train")
    for name, (_, summary) in TRAINERS.items():
        # the trainer reads its own arguments, --help included
        trainer = trainers.add_parser(name, help=summary, description=summary, add_help=False, prefix_chars="\0")
        trainer.add_argument("arguments", nargs="*", help=f"see `hf-kvcache train {name} --help`")


def run(args: argparse.Namespace) -> None:
    module, _ = TRAINERS[args.trainer]
    try:
        import_module(f"hf_kvcache.trainers.{module}").main(args.arguments)
    except (ValueError, ImportError, OSError) as error:
        raise UserError(str(error)) from error
