"""Means and paired differences with 95 % intervals."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import fmean

import numpy as np

Z = 1.959964
N_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean, and where it lies with a confidence of 95 %.

    Attributes:
        mean: of the values.
        low, high: ends of the interval; None where fewer than two values say nothing of their spread.
        kind: "wilson", "bonett-price", "bootstrap", "zou-donner" or "none".
        n: number of values; of the fewest where it is a mean of means.
    """

    mean: float
    low: float | None
    high: float | None
    kind: str
    n: int


def mean_of(values) -> Estimate:
    """Mean of independent scores in `[0, 1]`: Wilson's interval where all are 0 or 1, else the bootstrap's.

    Scores that are all alike leave the bootstrap nothing to draw: theirs is Wilson's, too, of so large a share.

    Raises:
        ValueError: there are none.
    """
    values = _checked(values)
    if np.isin(values, (0, 1)).all() or _are_alike(values, values):
        return Estimate(float(values.mean()), *wilson(values.sum(), len(values)), "wilson", len(values))
    return bootstrapped(values)


def difference_of(values, base) -> Estimate:
    """Mean of `values - base`, paired scores: Bonett and Price's interval where all are 0 or 1, else the bootstrap's.

    Differences that are all alike leave the bootstrap nothing to draw: theirs is Bonett and Price's, too.

    Raises:
        ValueError: there are none, or not as many of the one as of the other.
    """
    values, base = _checked(values), _checked(base)
    if values.shape != base.shape:
        raise ValueError(f"{len(values)} values and {len(base)} of the baseline are no pairs")
    gains = values - base
    if np.isin([values, base], (0, 1)).all() or _are_alike(gains, values, base):
        ends = bonett_price(gains.clip(min=0).sum(), -gains.clip(max=0).sum(), len(values))
        return Estimate(float(gains.mean()), *ends, "bonett-price", len(values))
    return bootstrapped(gains)


def mean_of_means(estimates: list[Estimate]) -> Estimate:
    """Mean of independent means, each of which counts alike (Zou and Donner 2008: distances to the ends, squared)."""
    mean, n = fmean(one.mean for one in estimates), min(one.n for one in estimates)
    if any(one.low is None for one in estimates):
        return Estimate(mean, None, None, "none", n)
    below = sqrt(sum((one.mean - one.low) ** 2 for one in estimates)) / len(estimates)
    above = sqrt(sum((one.high - one.mean) ** 2 for one in estimates)) / len(estimates)
    return Estimate(mean, mean - below, mean + above, "zou-donner", n)


def bootstrapped(values) -> Estimate:
    """Mean of independent values of whatever kind, with the bootstrap's interval.

    Raises:
        ValueError: there are none.
    """
    values = _checked(values)
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean, None, None, "none", len(values))
    return Estimate(mean, *bootstrap(values), "bootstrap", len(values))


def wilson(n_right: float, n: int) -> tuple[float, float]:
    """Interval of a proportion (Wilson 1927, score interval without correction)."""
    share, width = n_right / n, Z * Z / n
    middle = (share + width / 2) / (1 + width)
    half = Z * sqrt(share * (1 - share) / n + width / (4 * n)) / (1 + width)
    # exact at both ends, where rounding would leave a trace
    return (0.0 if n_right == 0 else middle - half), (1.0 if n_right == n else middle + half)


def bonett_price(n_gained: float, n_lost: float, n: int) -> tuple[float, float]:
    """Interval of the difference of two paired proportions (Bonett and Price 2012).

    Args:
        n_gained: pairs of which only the first is right.
        n_lost: pairs of which only the second is right.
        n: all pairs.
    """
    gained, lost = (n_gained + 1) / (n + 2), (n_lost + 1) / (n + 2)
    half = Z * sqrt((gained + lost - (gained - lost) ** 2) / (n + 2))
    return max(gained - lost - half, -1.0), min(gained - lost + half, 1.0)


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Percentiles of the means of resampled values `[n]`; the same values give the same interval."""
    drawn = np.random.default_rng(0).integers(len(values), size=(N_RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(1), (2.5, 97.5))
    return float(low), float(high)


def _are_alike(values: np.ndarray, *scores: np.ndarray) -> bool:
    """Whether there is nothing to draw among these, which come from scores: shares of what could be right."""
    are_scores = all(((one >= 0) & (one <= 1)).all() for one in scores)
    return len(values) > 1 and are_scores and bool(np.isclose(values, values[0], rtol=0, atol=1e-12).all())


def _checked(values) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("there are no values to take the mean of")
    return values
