"""A published data set as a task: its rows are instances, in their order or in one drawn from a seed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from hashlib import sha256
from zlib import crc32

import numpy as np

from hf_kvcache.eval.benchmarks.cutting import without_middle
from hf_kvcache.eval.benchmarks.loading import NoRows, Origin, Source
from hf_kvcache.eval.tasks.instances import Instance, Question, Task

# tokens of a text that remain at least
LEAST = 64


@dataclass(frozen=True)
class Kind:
    """What is known of a data set without its rows.

    Attributes:
        name: as typed: "longbench:multi_news".
        summary: one line.
        origin: where its rows are published.
        ask: instances with one question each that a row is, texts uncut.
        score: of an answer to a question, 0 to 1.
        paper: where it is defined, and its arXiv number.
    """

    name: str
    summary: str
    origin: Origin
    ask: Callable[[dict], Iterable[Instance]]
    score: Callable[[str, Question], float]
    paper: str

    @property
    def benchmark(self) -> str:
        return self.name.partition(":")[0]


class DataSet:
    """The rows of a data set.

    Where several questions are asked about a text, an instance is as many of those about the same text, in the order
    of the rows; what is left over of a text is not asked.

    Args:
        kind: which data set.
        source: where its rows are read, as soon as they are needed.
        seed: of their order; None for the published one.
    """

    def __init__(self, kind: Kind, source: Source, seed: int | None = None):
        self.kind, self.source, self.seed = kind, source, seed

    @property
    def task(self) -> Task:
        """As other tasks, with an end."""
        kind = self.kind
        return Task(kind.name, kind.summary, self.build, kind.score, kind.paper, self.n_instances)

    def n_instances(self, n_questions: int = 1) -> int:
        """How many instances with that many questions there are."""
        return len(self._groups(n_questions))

    def build(
        self, count: Callable[[str], int], n_tokens: int, rng: np.random.Generator, n_questions: int = 1, i: int = 0
    ) -> Instance:
        """Instance `i`, cut to `n_tokens` tokens, the longest question and the answer to it included."""
        instance = self._joined(self._groups(n_questions)[i])
        n_left = n_tokens - _beside(instance, count)
        context = without_middle(instance.context, max(n_left, 0), count)
        if n_left < LEAST and context != instance.context:
            least = n_tokens - n_left + LEAST
            raise ValueError(f"{self.kind.name} needs at least {least} tokens with this tokenizer, and has {n_tokens}")
        return replace(instance, context=context)

    def least_tokens(self, count: Callable[[str], int], n_instances: int, n_questions: int) -> int:
        """Tokens that the first instances need, if their texts are cut as far as may be."""
        instances = map(self._joined, self._groups(n_questions)[:n_instances])
        return max(_beside(one, count) + min(LEAST, len(one.context)) for one in instances)

    def about(self) -> dict:
        """What the instances depend on: where the rows are from, how many, in which order, and a sum of them."""
        instances, where = self._read
        texts = json.dumps([astuple(instance) for instance in instances], ensure_ascii=False)
        order = "published" if self.seed is None else f"drawn from seed {self.seed}"
        checksum = sha256(texts.encode("utf-8", "surrogatepass")).hexdigest()
        return {"from": where, "rows": len(instances), "order": order, "sha256": checksum}

    @cached_property
    def _read(self) -> tuple[list[Instance], str]:
        """Instances of one question each, and where they are from."""
        rows, where = self.source.rows(self.kind.benchmark, self.kind.origin)
        try:
            instances = [instance for row in rows for instance in self.kind.ask(row)]
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise NoRows(f"{where} is not of the form of {self.kind.name}: {type(error).__name__}: {error}") from error
        if not instances:
            raise NoRows(f"{where} has no rows of {self.kind.name}")
        return instances, where

    def _groups(self, n_questions: int) -> list[list[int]]:
        """Numbers of the rows of every instance."""
        instances = self._read[0]
        by_text: dict[tuple, list[int]] = defaultdict(list)
        for i, one in enumerate(instances):
            # by themselves where one question is asked
            by_text[(i,) if n_questions == 1 else (one.instruction, one.context)].append(i)
        groups = [
            rows[start : start + n_questions]
            for rows in by_text.values()
            for start in range(0, len(rows) - n_questions + 1, n_questions)
        ]
        if self.seed is not None:
            order = np.random.default_rng([self.seed, crc32(self.kind.name.encode())]).permutation(len(groups))
            groups = [groups[i] for i in order]
        return groups

    def _joined(self, group: list[int]) -> Instance:
        instances = [self._read[0][i] for i in group]
        return replace(instances[0], questions=tuple(q for one in instances for q in one.questions))


def _beside(instance: Instance, count: Callable[[str], int]) -> int:
    """Tokens of all but the text."""
    asked = max(count(q.text) + count(q.prefix) + q.max_new_tokens for q in instance.questions)
    return count(instance.instruction) + asked


def from_template(
    template: str, context: str, question: Question, is_plain: bool = False, /, **fields: str
) -> Instance:
    """An instance of a prompt with `{context}` and other fields, which stand behind it.

    Args:
        template: the prompt.
        context: the text.
        question: its text is what follows the context.
        fields: what the other fields are filled with.

    Raises:
        NoRows: something that is asked stands before the text, so that no cache could be without it.
    """
    before, found, after = template.partition("{context}")
    if not found or "{" in before:
        raise NoRows(f"a prompt has to have its question behind {{context}}: {template[:80]!r}")
    return Instance(before, context, (replace(question, text=after.format(**fields)),), is_plain)
