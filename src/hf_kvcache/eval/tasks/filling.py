"""Make a text as long as it may be: generators say how an instance of n pieces looks, and n is sought here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hf_kvcache.eval.tasks.instances import Instance

# a text that fills this share of the tokens is long enough
ENOUGH = 0.98


def size(instance: Instance, count: Callable[[str], int]) -> int:
    """Tokens of an instance with the longest of its questions and the answer to it; parts are counted one by one."""
    questions = [count(q.text) + count(q.prefix) + q.max_new_tokens for q in instance.questions]
    return count(instance.instruction) + count(instance.context) + max(questions)


def fill(
    name: str,
    make: Callable[[int, np.random.Generator], Instance],
    count: Callable[[str], int],
    n_tokens: int,
    rng: np.random.Generator,
    least: int = 1,
) -> Instance:
    """An instance of at most `n_tokens` tokens (`size`), and of almost as many.

    Args:
        name: the task's, for errors.
        make: an instance of n pieces, `make(n, rng)`; called for several n, each time with the same draws to come.
        count: how many tokens a text has.
        n_tokens: tokens of everything, the longest question and its answer included.
        rng: gives the seed of what `make` draws.
        least: fewest pieces that make sense.

    Raises:
        ValueError: `n_tokens` are too few for `least` pieces.
    """
    seed = rng.integers(2**63)

    def measured(n: int) -> tuple[int, Instance]:
        instance = make(n, np.random.default_rng(seed))
        return size(instance, count), instance

    low, high, size_high = least, None, 0
    size_low, best = measured(low)
    if size_low > n_tokens:
        raise ValueError(f"{name} needs at least {size_low} tokens with this tokenizer, and has {n_tokens}")
    while size_low < ENOUGH * n_tokens and (high is None or high - low > 1):
        if high is None:
            n = 2 * low
        else:
            share = ((1 + ENOUGH) / 2 * n_tokens - size_low) / (size_high - size_low)
            n = min(max(low + int(share * (high - low)), low + 1), high - 1)
        n_found, instance = measured(n)
        if n_found <= n_tokens:
            low, size_low, best = n, n_found, instance
        else:
            high, size_high = n, n_found
    return best
