"""Needles in a haystack: the eight retrieval tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from hf_kvcache.eval.tasks import haystacks, vocabulary
from hf_kvcache.eval.tasks.filling import fill
from hf_kvcache.eval.tasks.instances import Instance, Question, Task
from hf_kvcache.eval.tasks.scoring import string_match_all

# kinds of keys and values
DRAW = {"word": vocabulary.compounds, "number": vocabulary.numbers, "uuid": vocabulary.uuids}
# fewest sentences, words or needles of a haystack, and what is written between them
LEAST = {"noise": 10, "essay": 40, "needles": 3}
BETWEEN = {"noise": "\n", "essay": " ", "needles": "\n"}


@dataclass(frozen=True)
class Needles:
    """What is hidden in what, and how much of it is asked for.

    Attributes:
        haystack: "noise" (sentences that repeat), "essay" (prose) or "needles" (needles that nobody asks for).
        key: kind of the keys: "word", "number" or "uuid".
        value: kind of the values.
        n_keys: keys hidden in the haystack.
        n_values: values of every key.
        n_asked: keys that one question asks for.
    """

    haystack: str
    key: str = "word"
    value: str = "number"
    n_keys: int = 1
    n_values: int = 1
    n_asked: int = 1

    def make(self, n: int, rng: np.random.Generator, n_questions: int) -> Instance:
        """An instance with a haystack of `n` sentences, words or needles."""
        # several questions ask for one key each
        n_asked = self.n_asked if n_questions == 1 else 1
        n_hidden = max(self.n_keys, n_asked * n_questions)
        n_needles = n_hidden + (n if self.haystack == "needles" else 0)
        keys = DRAW[self.key](n_needles, rng)
        values = np.array(DRAW[self.value](n_needles * self.n_values, rng)).reshape(n_needles, self.n_values)
        written = [
            [f"One of the secret {self.value}s for {key} is: {value}." for value in row]
            for key, row in zip(keys, values, strict=True)
        ]
        hidden = [needle for row in written[:n_hidden] for needle in row]
        if self.haystack == "needles":
            pieces = [needle for row in written[n_hidden:] for needle in row]
        else:
            pieces = haystacks.noise(n) if self.haystack == "noise" else haystacks.essay(n, rng)
        pieces = haystacks.insert(pieces, hidden, haystacks.places(len(pieces), len(hidden), rng))
        asked = rng.permutation(n_hidden)[: n_asked * n_questions].reshape(n_questions, n_asked)
        questions = tuple(self._question([keys[i] for i in row], values[row].ravel().tolist()) for row in asked)
        return Instance(self._instruction(len(hidden)), BETWEEN[self.haystack].join(pieces), questions)

    def _instruction(self, n_hidden: int) -> str:
        one = n_hidden == 1
        what, them = (f"A secret {self.value} is", "it") if one else (f"Some secret {self.value}s are", "them")
        return f"{what} hidden in the text below. Keep {them} in mind: I will ask you for {them} afterwards.\n"

    def _question(self, keys: list[str], values: list[str]) -> Question:
        named = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
        if len(values) == 1:
            text, said = f"What is the secret {self.value}", (f"The secret {self.value}", "is")
        else:
            text, said = f"What are all the secret {self.value}s", (f"The secret {self.value}s", "are")
        return Question(
            text=f"\n{text} for {named} given in the text above?",
            answers=tuple(values),
            prefix=f" {said[0]} for {named} given in the text above {said[1]}",
            max_new_tokens=128,
        )


def build(
    name: str,
    needles: Needles,
    count: Callable[[str], int],
    n_tokens: int,
    rng: np.random.Generator,
    n_questions: int = 1,
) -> Instance:
    make = partial(needles.make, n_questions=n_questions)
    return fill(name, make, count, n_tokens, rng, LEAST[needles.haystack])


def task(name: str, summary: str, needles: Needles) -> Task:
    return Task(name, summary, partial(build, name, needles), string_match_all, "Hsieh et al. 2024, arXiv 2404.06654")


TASKS = (
    task("niah_single_1", "a number for a word, in sentences that repeat", Needles("noise")),
    task("niah_single_2", "a number for a word, in prose", Needles("essay")),
    task("niah_single_3", "a UUID for a word, in prose", Needles("essay", value="uuid")),
    task("niah_multikey_1", "one of four words' numbers, in prose", Needles("essay", n_keys=4)),
    task("niah_multikey_2", "a number for a word, among needles of the same kind", Needles("needles")),
    task("niah_multikey_3", "a UUID for a UUID, among needles of the same kind", Needles("needles", "uuid", "uuid")),
    task("niah_multivalue", "all four numbers of a word, in prose", Needles("essay", n_values=4)),
    task("niah_multiquery", "the numbers of four words, in prose", Needles("essay", n_keys=4, n_asked=4)),
)
