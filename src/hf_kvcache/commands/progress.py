"""How far a long run is, on standard error; and what it has found, in the form that standard output is for."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


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


def show(json: str, markdown: str, tables: Callable[[], Iterable], is_json: bool) -> None:
    """JSON where it is asked for, tables on a terminal, else Markdown."""
    from rich.console import Console

    console = Console()
    if is_json:
        print(json)
    elif console.is_terminal:
        console.print(*tables())
    else:
        print(markdown, end="")


def say_failures(lines: Iterable) -> None:
    """Why caches have not answered, to standard error."""
    failed = Counter((line.cache, line.error.splitlines()[0]) for line in lines if line.error)
    for (cache, error), n in failed.items():
        print(f"hf-kvcache eval: {cache}: {n} answer{'s' * (n > 1)} failed: {error}", file=sys.stderr)
