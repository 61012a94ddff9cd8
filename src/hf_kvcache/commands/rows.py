"""The rows of `hf-kvcache compare`, shown and kept as they are measured."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console

from hf_kvcache.eval.compare import Row, Settings
from hf_kvcache.eval.journal import Journal
from hf_kvcache.eval.kl_front import as_markdown, kl_front
from hf_kvcache.eval.report import as_line, as_table, caption, heading


class Rows:
    """What was measured so far.

    A terminal gets the table at the end; a pipe or a log gets a line for every row that has all its numbers. Where the
    output is JSON, the lines go to standard error. `has_front` adds the front of KL over bytes at the end.
    """

    def __init__(
        self,
        names: list[str],
        settings: Settings,
        about: dict,
        as_json: bool,
        journal: Journal | None,
        has_front: bool = False,
    ):
        self.settings, self.about, self.as_json, self.journal = settings, about, as_json, journal
        self.has_front = has_front
        self.title = f"{about['model']}, {about['dtype']}, {about['device']}"
        self.found: list[Row] = []
        self.console = Console(stderr=as_json)
        self.width = max(map(len, names))
        self.has_heading = False

    def take(self, row: Row, is_final: bool) -> None:
        """Keep a row, and show it where it will not stand in a table."""
        if not any(known is row for known in self.found):
            self.found.append(row)
        if self.journal is not None:
            self.journal.add(row, is_final)
        if is_final and not self.console.is_terminal:
            if not self.has_heading:
                self._print(self.title, heading(self.width))
                self.has_heading = True
            self._print(as_line(row, self.width))

    def show(self, is_whole: bool) -> None:
        """Print what has not been printed yet; JSON only where it is whole, since it is read by programs."""
        if self.console.is_terminal and self.found and not self.as_json:
            self.console.print(as_table(self.found, self.settings, self.title))
        elif self.has_heading:
            self._print(caption(self.settings))
        if self.has_front and not self.as_json:
            self._print("", as_markdown(kl_front(self.found)))
        if self.as_json and is_whole:
            print(json.dumps(self.result(), indent=1))

    def result(self) -> dict:
        """All of it, as it is written to compare.json."""
        front = {"pareto": [asdict(point) for point in kl_front(self.found)]} if self.has_front else {}
        return self.about | {"rows": [asdict(row) for row in self.found]} | front

    def _print(self, *lines: str) -> None:
        print(*lines, sep="\n", file=self.console.file, flush=True)
