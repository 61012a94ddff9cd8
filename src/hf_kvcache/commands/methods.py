"""List the methods that `--cache` and `--caches` know.

The table comes from the registry. `--markdown` prints it for the README, linked to docs/ and the papers; with `--page`,
the one of a page of docs/, with the arguments of its methods.
"""

from __future__ import annotations

import argparse

from hf_kvcache.commands import UserError

HEADER = ("method", "saves on", "what it does", "arguments", "paper")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--page", metavar="NAME", help="of this page of docs/ alone: eviction, quantisation, ...")


def run(args: argparse.Namespace) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from hf_kvcache.eval.peers import PEERS, is_installed

    if args.page is not None and not (args.markdown and args.page in pages()):
        raise UserError(f"--page: with --markdown, one of {', '.join(pages())}")
    if args.markdown:
        print(markdown() if args.page is None else page(args.page))
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

    return [(m.name, _axis(m), m.summary, m.arguments, m.source) for m in METHODS]


def markdown() -> str:
    """The README's table: every method, linked to its page and its paper."""
    from hf_kvcache.registry import METHODS

    found = [(f"[`{m.name}`](docs/{m.page}.md)", _axis(m), m.summary, _paper(m)) for m in METHODS]
    return _table(("method", "saves on", "what it does", "paper"), found)


def page(name: str) -> str:
    """The table of one page of docs/: its methods and their arguments."""
    from hf_kvcache.registry import METHODS

    found = [(f"`{m.name}`", m.summary, _code(m.arguments), _paper(m)) for m in METHODS if m.page == name]
    return _table(("method", "what it does", "arguments", "paper"), found)


def pages() -> list[str]:
    """Pages of docs/ that methods have."""
    from hf_kvcache.registry import METHODS

    return list(dict.fromkeys(m.page for m in METHODS))


def _axis(method) -> str:
    return "–" if method.axis == "none" else method.axis


def _paper(method) -> str:
    return f"[{method.paper}](https://arxiv.org/abs/{method.arxiv})" if method.arxiv else method.paper


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines))
