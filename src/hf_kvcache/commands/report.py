"""One report of several evaluations: which caches score best for their bytes, and what beats the others.

DIR is what `hf-kvcache eval --out DIR` wrote, also while it is written. Several folders are put together where they are
of the same model, dtype, seed and questions; where they differ in adapters, caches are called "cache @ adapter".

Settings and lengths are never mixed. A score is the mean of the tasks that the dense cache can do; those at which it
scores below --least stand apart. A cache is beaten by one that has the same or fewer bytes and no lower score on the
same instances. --speed names the folder of a `hf-kvcache compare --speed-only --out DIR` of the same model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hf_kvcache.commands import UserError
from hf_kvcache.commands.common import check_writable
from hf_kvcache.commands.numbers import share

RESULT, TABLE, PICTURE = "report.json", "report.md", "report.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folders of evaluations, or of one")
    parser.add_argument(
        "--least",
        type=share,
        default=0.1,
        metavar="SCORE",
        help="score of the dense cache below which a task stands apart (default: %(default)s)",
    )
    parser.add_argument("--speed", metavar="DIR", help="folder of a comparison, for decoding speeds")
    parser.add_argument("--out", metavar="DIR", help=f"also write there: {RESULT}, {TABLE} and {PICTURE}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    from hf_kvcache.eval.front import fronts
    from hf_kvcache.eval.front_report import as_markdown, make_report
    from hf_kvcache.eval.gathering import CannotGather, gather
    from hf_kvcache.eval.speeds import read_speeds

    out = None if args.out is None else Path(args.out)
    if out is not None:
        check_writable(out, "--out", (RESULT, TABLE, PICTURE))
    try:
        gathered = gather([Path(folder) for folder in args.folders])
        speeds, notes = ({}, []) if args.speed is None else read_speeds(Path(args.speed), gathered.about[0])
    except CannotGather as error:
        raise UserError(str(error)) from error
    try:
        report = make_report(gathered, fronts(gathered, args.least, speeds), args.least, notes)
    except ValueError as error:
        raise UserError(str(error)) from error
    text, table = json.dumps(report.as_dict(), indent=1), as_markdown(report)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / RESULT).write_text(text + "\n", encoding="utf-8")
        (out / TABLE).write_text(table, encoding="utf-8")
        _draw(report, out / PICTURE)
    print(text if args.json else table, end="\n" if args.json else "")
    return 0


def _draw(report, path: Path) -> None:
    try:
        from hf_kvcache.eval.front_picture import save_picture
    except ImportError:
        print("no picture: matplotlib is not installed (pip install hf_kvcache[plot])", file=sys.stderr)
        return
    save_picture(report, path)
