"""An evaluation as JSON lines, written while it goes on, from which a killed run goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

# of what the first line says, what may differ between two parts of one run
_MAY_DIFFER = {"date", "threads", "cores", "commit", "python"}


@dataclass(frozen=True)
class Line:
    """One answer.

    Attributes:
        task, length, instance, setting, cache, question: what was asked of whom; `length` is in tokens, `instance` and
            `question` count from 0.
        n_read: tokens that had been read when the cache compressed: the prompt ("known") or the context.
        n_asked: tokens that were read from there to this answer, the answers of earlier turns not counted.
        answer: of the model, without the prefix that it was given; None where an error came in between.
        n_answer: its tokens.
        score: 0 to 1.
        nbytes: bytes of the cache once it had compressed what it had read by then.
        filled: how the cache got its rows: "replayed" from one dense prefill, or "direct", and why.
        error: what went wrong; None for nothing.
    """

    task: str
    length: int
    instance: int
    setting: str
    cache: str
    question: int
    n_read: int | None = None
    n_asked: int | None = None
    answer: str | None = None
    n_answer: int | None = None
    score: float | None = None
    nbytes: int | None = None
    filled: str | None = None
    error: str | None = None

    @property
    def key(self) -> tuple:
        return self.task, self.length, self.instance, self.setting, self.cache, self.question


class OtherRun(ValueError):
    """A file has lines of another run."""


class Lines:
    """What has been answered so far, in a file whose first line says with what.

    Answers that failed are asked for again when a run goes on; the last line of a key counts.

    Args:
        path: the file, which is made or gone on with; None keeps lines in memory.
        about: what all lines depend on beside their own key: model, versions, settings.

    Raises:
        OtherRun: the file is of a run with other ones; names what differs.
    """

    # of the lines, for subclasses
    kind: type = Line

    def __init__(self, path: Path | None, about: dict):
        self.path, self.about = path, about
        self._known: dict[tuple, Line] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()
        if not path.exists() or not path.stat().st_size:
            path.write_text(json.dumps(about) + "\n", encoding="utf-8")

    def add(self, line: Line) -> None:
        """Keep a line, on disk before this returns."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(line)) + "\n")
        self._known[line.key] = line

    def has(self, key: tuple) -> bool:
        """Whether there is an answer with this key."""
        return key in self._known and self._known[key].error is None

    def __iter__(self):
        return iter(self._known.values())

    def __len__(self) -> int:
        return len(self._known)

    def _read(self) -> None:
        text = self.path.read_bytes()
        # a run that was killed may have written half of a line
        whole = text[: text.rfind(b"\n") + 1]
        first, *lines = whole.splitlines() or [b""]
        if first:
            try:
                self._check(json.loads(first))
                found = [self.kind(**json.loads(line)) for line in lines]
            except (json.JSONDecodeError, TypeError, AttributeError) as error:
                raise OtherRun(f"{self.path} is no evaluation ({error}); write to another folder") from error
            self._known = {line.key: line for line in found}
        if whole != text:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def _check(self, about: dict) -> None:
        ours, theirs = (_flat(known) for known in (json.loads(json.dumps(self.about)), about))
        for name in ours.keys() | theirs.keys():
            if name.split(".")[0] not in _MAY_DIFFER and ours.get(name) != theirs.get(name):
                raise OtherRun(
                    f"{self.path} has lines of another run: {name} was {theirs.get(name)!r}, now it is "
                    f"{ours.get(name)!r}; write to another folder"
                )


def _flat(known: dict, prefix: str = "") -> dict:
    """Nested dictionaries with names such as `settings.seed`."""
    flat = {}
    for name, value in known.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
