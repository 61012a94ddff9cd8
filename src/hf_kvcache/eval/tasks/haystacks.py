"""Texts that needles are hidden in: sentences that repeat, and prose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import islice

import numpy as np

from hf_kvcache.models import embedded_prose

NOISE = "The hills are low.", "The river is slow.", "The moon is pale.", "On we walk.", "Out and home once more."


def noise(n: int) -> list[str]:
    """Lines of `n` sentences in all, the same five on every line; the last may have fewer."""
    lines = [" ".join(NOISE)] * (n // len(NOISE))
    return lines + [" ".join(NOISE[: n % len(NOISE)])] * bool(n % len(NOISE))


@cache
def prose() -> tuple[str, ...]:
    """Sentences of the second half of the package's prose."""
    text = embedded_prose().read_text(encoding="utf-8")
    # a title ("Mr.") ends no sentence
    sentences = re.split(r"(?<!Mr\.)(?<!Mrs\.)(?:(?<=[.!?])|(?<=[.!?]\"))\s+", text[len(text) // 2 :])
    # the first one is cut
    return tuple(" ".join(sentence.split()) for sentence in sentences[1:])


def essay(n: int, rng: np.random.Generator) -> list[str]:
    """Sentences of `n` words in all, from a random one on, from the start again where the prose ends."""
    sentences, found = prose(), []
    at = int(rng.integers(len(sentences)))
    while n > 0:
        words = list(islice(sentences[at % len(sentences)].split(), n))
        found.append(" ".join(words))
        n, at = n - len(words), at + 1
    return found


def places(n_pieces: int, n_needles: int, rng: np.random.Generator) -> np.ndarray:
    """Before which of `n_pieces` pieces (the end counts as one) needles stand: uniform, different if possible."""
    return rng.choice(n_pieces + 1, n_needles, replace=n_needles > n_pieces + 1)


def insert(pieces: Sequence[str], needles: Sequence[str], before: np.ndarray) -> list[str]:
    """Pieces with needle i before piece `before[i]`; needles of one place stay in order."""
    found, start = [], 0
    for i in np.argsort(before, kind="stable"):
        found += [*pieces[start : before[i]], needles[i]]
        start = before[i]
    return [*found, *pieces[start:]]
