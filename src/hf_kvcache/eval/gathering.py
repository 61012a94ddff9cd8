"""Lines of several evaluations of one model, whose caches are told apart by the adapter that the model had."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from hf_kvcache.eval.lines import Line
from hf_kvcache.eval.summary import BASELINE

LINES = "eval.jsonl"
# what all folders have to agree on: other models, numbers or texts are other measurements
SHARED = (
    "model",
    "dtype",
    *(f"settings.{name}" for name in ("seed", "n_questions", "uses_template", "max_new_tokens")),
)


class CannotGather(ValueError):
    """A folder that has no evaluation, or one that does not belong to the others."""


@dataclass(frozen=True)
class Gathered:
    """What several evaluations have found.

    Attributes:
        about: the first line of every folder.
        lines: their answers; where folders differ in adapters, caches are called "cache @ adapter".
        notes: what a reader has to know of how they were put together.
    """

    about: list[dict]
    lines: list[Line]
    notes: list[str]

    @property
    def n_questions(self) -> int:
        """Questions about every text."""
        return self.about[0]["settings"]["n_questions"]


def gather(folders: list[Path]) -> Gathered:
    """Read the answers of all folders.

    Where two of them have the same answer of the same cache, that of the first counts; answers that failed never
    replace others.

    Raises:
        CannotGather: a folder has no evaluation, or is of another model, dtype, seed, number of questions or template;
            the folder is named, and what differs.
    """
    read = [_read(folder) for folder in folders]
    abouts = [about for about, _ in read]
    for folder, about in zip(folders[1:], abouts[1:], strict=True):
        for name in SHARED:
            first, own = _value(abouts[0], name), _value(about, name)
            if first != own:
                raise CannotGather(f"{folder}: {name} is {own!r}, but {folders[0]} has {first!r}")
    labels = _labels([about.get("adapter") for about in abouts])
    found: dict[tuple, Line] = {}
    n_repeated = n_other = 0
    for (_, lines), label in zip(read, labels, strict=True):
        for line in lines:
            line = replace(line, cache=line.cache + label)
            known = found.get(line.key)
            if known is None or known.error is not None:
                found[line.key] = line
            elif line.error is None:
                n_repeated += 1
                n_other += (line.answer, line.score) != (known.answer, known.score)
    notes = []
    if n_repeated:
        notes.append(
            f"{n_repeated:,} answers were given in more than one folder, {n_other:,} of them differently; those of the "
            "folder that was named first count."
        )
    return Gathered(abouts, list(found.values()), notes)


def baseline_of(cache: str) -> str:
    """The dense cache of the same model with the same adapter."""
    _, at, adapter = cache.partition(" @ ")
    return BASELINE + at + adapter


def _read(folder: Path) -> tuple[dict, list[Line]]:
    path = folder / LINES
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CannotGather(f"{folder}: no evaluation there ({error})") from error
    # a run that goes on, or was killed, may have written half of the last line
    first, *lines = text[: text.rfind("\n") + 1].splitlines() or [""]
    try:
        about = json.loads(first)
        about["settings"]["n_questions"]
        # the last line of a key counts
        found = {line.key: line for line in (Line(**json.loads(line)) for line in lines)}
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise CannotGather(f"{path} is no evaluation ({type(error).__name__}: {error})") from error
    return about, list(found.values())


def _labels(adapters: list[str | None]) -> list[str]:
    """What is added to the names of caches: nothing where all folders have the same adapter."""
    if len(set(adapters)) == 1:
        return [""] * len(adapters)
    short = {name: Path(name).name for name in adapters if name is not None}
    is_clear = len(set(short.values())) == len(short)
    return ["" if name is None else f" @ {short[name] if is_clear else name}" for name in adapters]


def _value(about: dict, name: str):
    for part in name.split("."):
        about = about.get(part) if isinstance(about, dict) else None
    return about
