"""Common and frequent words: RULER's tasks of counting (Hsieh et al. 2024, arXiv 2404.06654, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from string import ascii_lowercase

import numpy as np

from hf_kvcache.eval.tasks import vocabulary
from hf_kvcache.eval.tasks.filling import fill
from hf_kvcache.eval.tasks.instances import Instance, Question, Task
from hf_kvcache.eval.tasks.scoring import string_match_all

N_COMMON = 10
COMMON_INSTRUCTION = (
    "Below is a numbered list of words. Some of them stand there more often than others. Keep those in mind that stand "
    "there most often.\n"
)
COMMON_QUESTION = f"\nQuestion: Which {N_COMMON} words of the list above are the most common?"
COMMON_PREFIX = f" Answer: The {N_COMMON} words that stand most often in the list are:"
# exponent of the zeta distribution that frequencies follow, and the constant that makes it one
ALPHA, ZETA = 2.0, np.pi**2 / 6


def numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def listed(n: int, n_times_common: int, n_times: int, rng: np.random.Generator) -> tuple[str, list[str]]:
    """A numbered list in which ten words stand `n_times_common` times, and `n` others `n_times`; then the ten."""
    # what the task itself says would count as said by who repeats it
    usable = [word for word in vocabulary.plain_words() if word not in COMMON_INSTRUCTION + COMMON_PREFIX]
    pool = [usable[i] for i in rng.permutation(len(usable))]
    common: list[str] = []
    while len(common) < N_COMMON:
        word = pool.pop()
        # a word inside another would count as said with it
        if not any(word in other or other in word for other in common):
            common.append(word)
    # more than there are single words: compounds, of which some fall out below
    pool += vocabulary.compounds(2 * n, rng) if n > len(pool) // 2 else []
    others = [word for word in pool if not any(found in word for found in common)][:n]
    written = common * n_times_common + others * n_times
    return numbered([written[i] for i in rng.permutation(len(written))]), common


def make_common(n: int, rng: np.random.Generator, is_long: bool) -> Instance:
    """A list with `n` words that are not common, after a short example with an answer."""
    example, found = listed(*((30, 10, 3) if is_long else (10, 3, 1)), rng)
    answered = f"{COMMON_INSTRUCTION}{example}{COMMON_QUESTION}{COMMON_PREFIX} {numbered(found)}\n"
    context, common = listed(n, *((30, 3) if is_long else (6, 1)), rng)
    question = Question(COMMON_QUESTION, tuple(common), COMMON_PREFIX, 120)
    return Instance(answered + COMMON_INSTRUCTION, context, (question,))


def coded(n: int, rng: np.random.Generator) -> list[str]:
    """`n` different words of six random letters; with a generator in the same state, more begin with fewer."""
    words: dict[str, None] = {}
    while len(words) < n:
        words["".join(ascii_lowercase[i] for i in rng.integers(len(ascii_lowercase), size=6))] = None
    return list(words)


def make_frequent(n: int, rng: np.random.Generator) -> Instance:
    """A text of about `n` coded words: the k-th stands `n / (ZETA * k**ALPHA)` times, and the first is dots."""
    n_ranks = int((n / ZETA) ** (1 / ALPHA))
    times = (n / (ZETA * np.arange(1, n_ranks + 1) ** ALPHA)).astype(int)
    words = ["...", *coded(n_ranks - 1, rng)]
    written = [word for word, t in zip(words, times, strict=True) for _ in range(t)]
    return Instance(
        "Read the coded text below and count how often every coded word stands in it. Find the three most frequent "
        "ones.\n",
        " ".join(written[i] for i in rng.permutation(len(written))),
        (
            Question(
                text="\nQuestion: Do not explain anything, and do not count the dots '...'. Which three words are the "
                "most frequent ones in the coded text above?",
                answers=tuple(words[1:4]),
                prefix=" Answer: The three most frequent words in the coded text above are:",
                max_new_tokens=50,
            ),
        ),
    )


def build_common(
    count: Callable[[str], int], n_tokens: int, rng: np.random.Generator, n_questions: int = 1
) -> Instance:
    """One question, however many are wished for."""
    return fill("cwe", partial(make_common, is_long=n_tokens >= 4096), count, n_tokens, rng, 10)


def build_frequent(
    count: Callable[[str], int], n_tokens: int, rng: np.random.Generator, n_questions: int = 1
) -> Instance:
    """One question, however many are wished for."""
    # from 74 words on, the fourth word always stands more often than the fifth
    return fill("fwe", make_frequent, count, n_tokens, rng, 74)


PAPER = "Hsieh et al. 2024, arXiv 2404.06654"
TASKS = (
    Task("cwe", "the ten common words of a list", build_common, string_match_all, PAPER),
    Task("fwe", "the three most frequent words of a coded text", build_frequent, string_match_all, PAPER),
)
