"""Write ops as kernel repositories, which the package `kernels` loads without this library.

    hf-kvcache kernel quant_attention --out built
    hf-kvcache kernel all --out built

`kernels.get_local_kernel(Path("built/quant_attention"))` loads one; `hf-kvcache push built/quant_attention REPO`
publishes it.
"""

from __future__ import annotations

import argparse

from hf_kvcache.commands import UserError
from hf_kvcache.commands.common import say_written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="+", metavar="OP", help="folder of `kernels/`, as quant_attention, or all")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to, one folder per op")


def run(args: argparse.Namespace) -> None:
    from hf_kvcache.hub.kernel_repo import WITH, build_kernel, exports

    ops = list(WITH) if args.ops == ["all"] else args.ops
    try:
        # a wrong name is found before anything is written
        for op in ops:
            exports(op)
        for op in ops:
            say_written(build_kernel(op, args.out))
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
