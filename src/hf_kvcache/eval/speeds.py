"""Decoding speeds that a comparison has measured, to stand beside scores."""

from __future__ import annotations

import json
from pathlib import Path

from hf_kvcache.eval.gathering import CannotGather

LINES = "compare.jsonl"


def read_speeds(folder: Path, about: dict) -> tuple[dict[str, float], list[str]]:
    """Speeds of caches as shares of `DynamicCache`'s in the same rounds, and a note on where they come from.

    Args:
        folder: of `hf-kvcache compare --out`, finished or not.
        about: the first line of the evaluation that they stand beside.

    Raises:
        CannotGather: there is no comparison, or one of another model or dtype.
    """
    path = folder / LINES
    try:
        text = path.read_text(encoding="utf-8")
        first, *rows = (json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines())
        context = first["settings"]["context"]
        found = {row["cache"]: row["speedup"] for row in rows if row.get("speedup") is not None}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CannotGather(f"{path}: no comparison there ({type(error).__name__}: {error})") from error
    for name in ("model", "dtype"):
        if first.get(name) != about[name]:
            raise CannotGather(f"{folder}: {name} is {first.get(name)!r}, but the evaluation has {about[name]!r}")
    note = (
        f"speed: decoded tokens per second as a share of DynamicCache's in the same run, after {context:,} tokens, on "
        f"{first['device']}, {first['threads']} threads."
    )
    return found, [note]
