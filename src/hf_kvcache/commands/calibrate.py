"""Calibrate what a method has to know of a model, and save it as an adapter.

`lowrank` is the method there is: `hf-kvcache calibrate lowrank --help`.
"""

from __future__ import annotations

import argparse

from hf_kvcache.trainers import calibrate_lowrank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    methods = parser.add_subparsers(dest="method", metavar="METHOD", required=True, help="what to calibrate for")
    lowrank = methods.add_parser(
        "lowrank",
        help="bases of a low-rank cache",
        description=calibrate_lowrank.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    calibrate_lowrank.add_arguments(lowrank)
    lowrank.set_defaults(calibrate=calibrate_lowrank.run)


def run(args: argparse.Namespace) -> None:
    return args.calibrate(args)
