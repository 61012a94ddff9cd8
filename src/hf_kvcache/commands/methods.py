"""List the methods that `--cache` and `--caches` know.

The table comes from the registry; `--markdown` prints it for the README.
"""

from __future__ import annotations

import argparse

HEADER = ("method", "saves on", "what it does", "arguments", "paper")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(args: argparse.Namespace) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from hf_kvcache.eval.peers import PEERS, is_installed

    if args.markdown:
        print(markdown())
        return
    console = Console()
    table = Table(box=box.SIMPLE_HEAD)
    for name in HEADER:
        table.add_column(name, overflow="fold")
    for row in rows():
        table.add_row(*row)
    console.print(table)
    peers = ", ".join(name if is_installed(name) else f"{name} (not installed)" for name in PEERS)
    console.print(f"transformers' own caches, for comparison: {peers}", highlight=False)


def rows() -> list[tuple[str, ...]]:
    """One tuple per method, in the order of `HEADER`."""
    from hf_kvcache.registry import METHODS

    return [(m.name, "–" if m.axis == "none" else m.axis, m.summary, m.arguments, m.paper) for m in METHODS]


def markdown() -> str:
    """The README's table."""
    lines = [HEADER, ("---",) * len(HEADER)]
    for name, axis, summary, arguments, paper in rows():
        lines.append((f"`{name}`", axis, summary, f"`{arguments}`" if arguments else "", paper))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
