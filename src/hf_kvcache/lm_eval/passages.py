"""What log-likelihoods are of: which tokens are read before the cache compresses, and which are fed through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Passage:
    """Tokens in three parts: the cache compresses after `read`, then comes `fed`, one token at a time, then `last`.

    Attributes:
        read: tokens that the model reads in one pass; none where the context is a single token.
        fed: at least one token. What is predicted after each of them is predicted through the compressed cache.
        last: the token that is predicted last, and not fed.
        n_given: tokens that are not predicted, the context: some or all of `read`, or those and the first of `fed`.
    """

    read: tuple[int, ...]
    fed: tuple[int, ...]
    last: int
    n_given: int

    @property
    def n_by_the_way(self) -> int:
        """Tokens that the one pass over `read` predicts: those of `read` that are not given, and the first of `fed`."""
        return len(self.read) + 1 - self.n_given


def answer(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Passage:
    """A continuation of a context, all of which is predicted through the cache.

    The context is read without its last token, as `long_prompts.prefill` does before `generate`: what the prefill
    itself predicts is exact in most caches, so an answer of one token would be scored without any compression.

    Args:
        context, continuation: token ids, one each at least.
        max_length: tokens that the model reads at most; of longer ones those on the left are left out.

    Raises:
        ValueError: there is no token in one of them, or the continuation alone is too long.
    """
    ids, n_given = _cut(context, continuation, max_length)
    return Passage(ids[: n_given - 1], ids[n_given - 1 : -1], ids[-1], n_given)


def text(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Passage:
    """A window of a text (perplexity): its first half is read and scored by the way, the second through the cache.

    A context that takes more than half of the window is read as a whole.

    Args:
        context: what is not predicted, one token at least: that which stands before a text, or an earlier part of it.
        continuation, max_length: see `answer`.

    Raises:
        ValueError: see `answer`.
    """
    ids, n_given = _cut(context, continuation, max_length)
    # a token at least is fed
    n_read = max(min(n_given, len(ids) - 2), (len(ids) - 1) // 2)
    return Passage(ids[:n_read], ids[n_read:-1], ids[-1], n_given)


def _cut(context: Sequence[int], continuation: Sequence[int], max_length: int) -> tuple[tuple[int, ...], int]:
    """All tokens, the last of which is not read, and how many of them are given."""
    if not context or not continuation:
        raise ValueError("there is nothing to score: context and continuation need a token each")
    if len(continuation) > max_length:
        raise ValueError(
            f"a continuation has {len(continuation):,} tokens, and the model reads at most {max_length:,} (max_length)"
        )
    ids = (*context, *continuation)[-(max_length + 1) :]
    return ids, len(ids) - len(continuation)
