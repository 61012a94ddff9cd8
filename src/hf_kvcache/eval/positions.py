"""What going on with texts has found: loss and KL by position behind the compression and by tokens read before it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import exp
from statistics import fmean

from hf_kvcache.eval.continuing import Continued
from hf_kvcache.eval.intervals import Estimate, bootstrapped
from hf_kvcache.eval.summary import BASELINE

# last positions of bins, counted from the first token that is fed through the compressed cache
EDGES = (16, 64, 256, 1024, 4096, 16384)


@dataclass(frozen=True)
class Position:
    """One cache after one number of tokens, over a bin of positions. Texts are independent, their tokens are not.

    Attributes:
        length: tokens read and compressed.
        first, last: positions of the bin, from 1; the first row of a cache is of all.
        cache: as typed.
        n_texts: that are scored.
        n_failed: that ended in an error.
        perplexity: exp of the mean loss per token, and of the ends of its interval.
        loss: mean loss of a token less the baseline's on the same texts, in nats; None for the baseline itself.
        kl: mean KL to the baseline, in nats per token; None for the baseline itself.
        bytes_ratio: mean bytes as a share of the baseline's, once both had compressed.
        n_replayed: texts whose rows came from a dense prefill.
    """

    length: int
    first: int
    last: int
    cache: str
    n_texts: int
    n_failed: int
    perplexity: Estimate | None
    loss: Estimate | None
    kl: Estimate | None
    bytes_ratio: float | None
    n_replayed: int


def bins(n_next: int) -> list[tuple[int, int]]:
    """All positions, then their bins: up to 16, 64, 256, ..."""
    ends = [0, *(edge for edge in EDGES if edge < n_next), n_next]
    parts = [(first + 1, last) for first, last in pairwise(ends)]
    return [(1, n_next), *parts] if len(parts) > 1 else [(1, n_next)]


def by_position(lines: Iterable[Continued], n_next: int) -> list[Position]:
    """Of every length and cache, in the order in which they come first, and of every bin.

    Args:
        lines: of one evaluation.
        n_next: tokens that were fed behind every text.
    """
    groups: dict[tuple, list[Continued]] = defaultdict(list)
    for line in lines:
        groups[line.length, line.cache].append(line)
    lengths = dict.fromkeys(length for length, _ in groups)
    return [
        _position(key, span, groups)
        for length in lengths
        for key in groups
        if key[0] == length
        for span in bins(n_next)
    ]


def _position(key: tuple, span: tuple[int, int], groups: dict) -> Position:
    length, cache = key
    first, last = span
    scored = [line for line in groups[key] if line.error is None]
    dense = {line.text: line for line in groups.get((length, BASELINE), ()) if line.error is None}

    def mean(values: list[float]) -> float:
        return fmean(values[first - 1 : last])

    losses = [mean(line.loss) for line in scored]
    paired = [mean(line.loss) - mean(dense[line.text].loss) for line in scored if line.text in dense]
    shares = [line.nbytes / dense[line.text].nbytes for line in scored if line.text in dense]
    is_base = cache == BASELINE
    return Position(
        length,
        first,
        last,
        cache,
        n_texts=len(scored),
        n_failed=len(groups[key]) - len(scored),
        perplexity=_exp(bootstrapped(losses)) if losses else None,
        loss=bootstrapped(paired) if paired and not is_base else None,
        kl=bootstrapped([mean(line.kl) for line in scored]) if scored and not is_base else None,
        bytes_ratio=fmean(shares) if shares else None,
        n_replayed=sum(line.filled == "replayed" for line in scored),
    )


def _exp(found: Estimate) -> Estimate:
    ends = (None if end is None else exp(end) for end in (found.low, found.high))
    return replace(found, mean=exp(found.mean), **dict(zip(("low", "high"), ends)))
