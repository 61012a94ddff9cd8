"""Instances of one task that are read and asked together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from hf_kvcache.eval.lines import Line
from hf_kvcache.eval.prompts import Prompt
from hf_kvcache.eval.tasks.instances import Instance, Question, Task

# questions that have no answer yet, by setting and cache
Missing = dict[tuple[str, str], list[int]]


@dataclass(frozen=True)
class Asked:
    """One instance in a batch.

    Attributes:
        number: of the instance.
        instance, prompt: what is asked, as text and as token ids.
        missing: questions that have no answer yet, by setting and cache.
    """

    number: int
    instance: Instance
    prompt: Prompt
    missing: Missing


@dataclass(frozen=True)
class Batch:
    """Instances whose questions, in their order, have the same numbers of tokens, and lack the same answers.

    Attributes:
        task, length: as in `Line`.
        rows: the instances.
        n_new: the most tokens of an answer, by question.
    """

    task: Task
    length: int
    rows: list[Asked]
    n_new: list[int]

    @property
    def missing(self) -> Missing:
        return self.rows[0].missing

    def keys(self, setting: str, cache: str, question: int) -> list[tuple]:
        """Keys of the lines of one question."""
        return [(self.task.name, self.length, row.number, setting, cache, question) for row in self.rows]

    def lines(self, setting: str, cache: str, question: int, **known) -> Iterator[Line]:
        """A line for each row; lists hold what differs between them."""
        for i, key in enumerate(self.keys(setting, cache, question)):
            yield Line(*key, **{name: x[i] if isinstance(x, list) else x for name, x in known.items()})


def batches(task: Task, length: int, asked: list[Asked], size: int, limit: int | None) -> Iterator[Batch]:
    """Instances in batches of at most `size`, as even as they come.

    Only contexts are padded: what is appended to a cache is as long in every row. Contexts of like length go together.

    Args:
        task, length: of all of them.
        asked: instances.
        size: of a batch.
        limit: the most tokens of an answer; None for what the task allows.
    """
    groups: dict[tuple, list[Asked]] = defaultdict(list)
    for row in asked:
        n_new = [most_new(question, limit) for question in row.instance.questions]
        alike = [len(ids) for ids in row.prompt.questions], n_new, sorted(row.missing.items())
        groups[repr(alike)].append(row)
    for rows in groups.values():
        rows = sorted(rows, key=lambda row: len(row.prompt.context))
        n_new = [most_new(question, limit) for question in rows[0].instance.questions]
        n_batches = -(-len(rows) // size)
        for i in range(n_batches):
            start, stop = len(rows) * i // n_batches, len(rows) * (i + 1) // n_batches
            yield Batch(task, length, rows[start:stop], n_new)


def most_new(question: Question, limit: int | None) -> int:
    """The most tokens of an answer."""
    return min(question.max_new_tokens, limit or question.max_new_tokens)
