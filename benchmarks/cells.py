"""Answers of an evaluation, packed for the repository: scores and lengths by cell, without their words."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from hf_kvcache.eval.lines import Line, Lines

CELL = ("task", "length", "setting", "cache", "filled", "question")
# of a cell's lines
MEANS = ("n_read", "n_asked", "nbytes")


def pack(lines: Iterable[Line], pieces: list[dict]) -> dict:
    """What lines say, but the answers themselves.

    Args:
        lines: of an evaluation; failed ones are left out.
        pieces: what the runs that made them ran with.
    """
    found: dict[tuple, list[Line]] = defaultdict(list)
    for line in lines:
        if line.error is None:
            found[tuple(getattr(line, name) for name in CELL)].append(line)
    packed = []
    for key, answered in found.items():
        answered.sort(key=lambda line: line.instance)
        columns = {
            "instances": [line.instance for line in answered],
            "scores": [round(line.score, 4) for line in answered],
            "n_answer": [line.n_answer for line in answered],
        } | {name: round(fmean(getattr(line, name) for line in answered)) for name in MEANS}
        packed.append(dict(zip(CELL, key, strict=True)) | columns)
    return {"pieces": pieces, "cells": packed}


def unpack_into(lines: Lines, path: Path) -> list[dict]:
    """Add the answers of a packed file that lines lack; returns what its pieces ran with.

    Raises:
        ValueError: they are of another model, another dtype or other settings.
    """
    packed = json.loads(path.read_text(encoding="utf-8"))
    for piece in packed["pieces"]:
        for name in ("model", "dtype", "settings", "adapter"):
            if piece[name] != lines.about[name]:
                raise ValueError(f"{path} is of {name} {piece[name]!r}, not {lines.about[name]!r}")
    for cell in packed["cells"]:
        # files of one question for each text do not name it
        common = {"question": 0} | {name: cell[name] for name in (*CELL, *MEANS) if name in cell}
        for i, score, n in zip(cell["instances"], cell["scores"], cell["n_answer"], strict=True):
            line = Line(**common, instance=i, score=score, n_answer=n, answer="")
            if not lines.has(line.key):
                lines.add(line)
    return packed["pieces"]
