"""Points that no other point beats in both bytes and quality, and the levels of compression that caches belong to."""

from __future__ import annotations

from collections.abc import Callable
from math import log2

# times smaller than dense
LEVELS = (1, 2, 4, 8, 16)
# bytes that differ by less are the same: a window of a few rows more, a page that is not full
SAME_BYTES = 0.01


def level_of(bytes_ratio: float) -> int:
    """The nearest of `LEVELS` on a logarithmic scale; what is smaller than a sixteenth belongs to the last."""
    steps = round(-log2(bytes_ratio)) if bytes_ratio > 0 else len(LEVELS)
    return LEVELS[min(max(steps, 0), len(LEVELS) - 1)]


def dominators(sizes: list[float], gain: Callable[[int, int], float | None]) -> list[int | None]:
    """Of every point the one that dominates it: same or fewer bytes, and not worse; None on the front.

    Of several the best one is named, of equally good ones the smallest. Bytes within `SAME_BYTES` are the same; of two
    points that are alike in both, neither dominates.

    Args:
        sizes: bytes of the points, in any unit.
        gain: `gain(a, b)` says by how much point `a` is better than `b`, negative where it is worse; None where they
            cannot be compared.
    """
    found = []
    for b, size in enumerate(sizes):
        better = []
        for a, other in enumerate(sizes):
            if a == b or other > size * (1 + SAME_BYTES) or (won := gain(a, b)) is None:
                continue
            if won > 0 or (won == 0 and other * (1 + SAME_BYTES) < size):
                better.append((won, -other, a))
        found.append(max(better)[2] if better else None)
    return found
