"""The front of a comparison: the caches that stay closest to the dense model for their bytes."""

from __future__ import annotations

from dataclasses import dataclass

from hf_kvcache.eval.compare import Row
from hf_kvcache.eval.pareto import dominators, level_of

CAPTION = (
    "level: the nearest of 1, 2, 4, 8 and 16 times smaller. beaten by: a cache of the same or fewer bytes whose KL is "
    "not higher, and the KL of which; a dash is the front. One text, no intervals: `hf-kvcache eval` and `report` have "
    "them."
)


@dataclass(frozen=True)
class KLPoint:
    """A row of the front.

    Attributes:
        cache, bytes_ratio, kl, speedup: as in `Row`.
        level: the nearest of 1, 2, 4, 8 and 16 times smaller.
        beaten_by: a cache of the same or fewer bytes whose KL is not higher; None on the front.
    """

    cache: str
    bytes_ratio: float
    kl: float
    speedup: float | None
    level: int
    beaten_by: str | None


def kl_front(rows: list[Row]) -> list[KLPoint]:
    """All rows that have bytes and KL, by level, then by KL."""
    known = [row for row in rows if row.bytes_ratio is not None and row.kl is not None]
    beaten = dominators([row.bytes_ratio for row in known], lambda a, b: known[b].kl - known[a].kl)
    points = [
        KLPoint(
            row.cache,
            row.bytes_ratio,
            row.kl,
            row.speedup,
            level_of(row.bytes_ratio),
            None if by is None else known[by].cache,
        )
        for row, by in zip(known, beaten, strict=True)
    ]
    return sorted(points, key=lambda point: (point.level, point.kl))


def as_markdown(points: list[KLPoint]) -> str:
    """A table, with what its columns are."""
    kl = {point.cache: point.kl for point in points}
    lines = ["| level | cache | bytes | KL, nats | decode | beaten by |", "| ---: | --- | ---: | ---: | ---: | --- |"]
    for point in points:
        by = "–" if point.beaten_by is None else f"`{point.beaten_by}`, {kl[point.beaten_by]:.4f}"
        speed = "–" if point.speedup is None else f"{point.speedup:.2f}×"
        cells = f"{point.level}×", f"`{point.cache}`", f"{point.bytes_ratio:.3f}", f"{point.kl:.4f}", speed, by
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", CAPTION])
