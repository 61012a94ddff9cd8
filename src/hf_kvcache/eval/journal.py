"""A comparison as JSON lines, written while it goes on, so that an interrupted one keeps what it has."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from hf_kvcache.eval.compare import Row


class Journal:
    """A file whose first line says what is measured (`report.about`), and every further one what is known of a row.

    A row has as many lines as it was measured in steps: the last one of a cache counts, and `is_final` says whether
    there was nothing left to measure.
    """

    def __init__(self, path: Path, about: dict):
        self.path = path
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(about) + "\n", encoding="utf-8")

    def add(self, row: Row, is_final: bool) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row) | {"is_final": is_final}) + "\n")
