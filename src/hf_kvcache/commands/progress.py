"""How far a long run is, on standard error; and what it has found, in the form that standard output is for."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path


@contextmanager
def shown(n_lines: int) -> Iterator[Callable[[str, int], None]]:
    """A bar of so many lines; gives a function that is called with a stage and its lines before it begins."""
    from re import escape
    from warnings import catch_warnings, filterwarnings

    from rich import progress
    from rich.console import Console

    from hf_kvcache.codecs.fitting import FITTED

    columns = progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn()
    columns += progress.TimeRemainingColumn(), progress.TextColumn("{task.description}")
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar, catch_warnings():
        # said in the help of `compare`: here it is no mistake
        filterwarnings("ignore", message=f".*{escape(FITTED)}")
        task = bar.add_task("", total=n_lines)
        n_begun = 0

        def advance(stage: str, n: int) -> None:
            # what has begun is done when the next one begins
            nonlocal n_begun
            bar.update(task, advance=n_begun, description=stage)
            n_begun = n

        yield advance


def publish(rows: list, about: dict, lines: Iterable, files: tuple[Path, Path], as_markdown, as_tables, as_json: bool):
    """Summaries to two files and to standard output: JSON where asked for, tables on a terminal, else Markdown.

    Args:
        rows: dataclasses of what was found.
        about: what it was found with.
        lines: all answers; why some of them failed goes to standard error.
        files: for JSON and for Markdown.
        as_markdown: of the rows and a title.
        as_tables: of the rows, for a terminal.
        as_json: whether standard output gets JSON.
    """
    from rich.console import Console

    text = json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1)
    markdown = as_markdown(rows, f"{about['model']}, {about['dtype']}, {about['device']}")
    for file, content in zip(files, (text + "\n", markdown), strict=True):
        file.write_text(content, encoding="utf-8")
    console = Console()
    if as_json:
        print(text)
    elif console.is_terminal:
        console.print(*as_tables(rows))
    else:
        print(markdown, end="")
    _say_failures(lines)


def _say_failures(lines: Iterable) -> None:
    """Why caches have not answered, to standard error."""
    failed = Counter((line.cache, line.error.splitlines()[0]) for line in lines if line.error)
    for (cache, error), n in failed.items():
        print(f"hf-kvcache eval: {cache}: {n} answer{'s' * (n > 1)} failed: {error}", file=sys.stderr)
