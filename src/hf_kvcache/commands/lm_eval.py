"""Run the lm-evaluation-harness with the model `hf-kvcache`, which answers through a compressed cache.

    hf-kvcache lm-eval --model hf-kvcache --model_args pretrained=smollm2,cache=quant:bits=4 --tasks arc_easy

All arguments are the harness' own: `hf-kvcache lm-eval run --help` lists them, `hf-kvcache lm-eval ls tasks` its tasks.
Those of the model are in docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import sys

from hf_kvcache.commands import UserError

# the harness reads its own arguments
PARSER = {"add_help": False, "prefix_chars": "\0"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs="*", help="those of the command lm-eval")
    parser.set_defaults(show_help=parser.print_help)


def run(args: argparse.Namespace) -> None:
    if args.arguments in ([], ["--help"], ["-h"]):
        args.show_help()
        return
    try:
        from hf_kvcache.lm_eval import ArgumentError, main
    except ImportError as error:
        raise UserError(str(error)) from error
    before, sys.argv = sys.argv, ["lm-eval", *args.arguments]
    try:
        main()
    except ArgumentError as error:
        raise UserError(str(error)) from error
    finally:
        sys.argv = before
