"""Rows of results in a JSON file that is written after each of them."""

from __future__ import annotations

import json
from pathlib import Path


class Rows:
    """What has been measured; a row with the same `part` and `name` is replaced.

    Args:
        path: the file, which is made or gone on with.
        about: what is said of the machine, of the last part of the run.
    """

    def __init__(self, path: Path, about: dict):
        self.path, self.about = path, about
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
        self.rows = {(row["part"], row["name"]): row for row in found["rows"]}

    def has(self, part: str, name: str) -> bool:
        return (part, name) in self.rows

    def add(self, part: str, name: str, **row) -> None:
        """Keep a row, on disk before this returns."""
        self.rows[part, name] = {"part": part, "name": name, **row}
        text = json.dumps(self.about | {"rows": list(self.rows.values())}, indent=1, default=str)
        self.path.write_text(text + "\n", encoding="utf-8")
        print(json.dumps(self.rows[part, name], default=str), flush=True)
