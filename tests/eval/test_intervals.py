"""Intervals against values of the literature, and how often they hold what they promise."""

import numpy as np
import pytest

from hf_kvcache.eval.intervals import bonett_price, difference_of, mean_of, mean_of_means, wilson


def test_wilson_is_the_published_one():
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    for n_right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson(n_right, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1), abs=5e-5) and wilson(29, 29)[1] == 1.0


def test_bonett_price_is_the_published_one():
    # Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33:2850: 1, 1, 7 and 12 of 21 children
    assert bonett_price(1, 7, 21) == pytest.approx((-0.508, -0.0135), abs=1e-3)
    assert bonett_price(7, 1, 21) == pytest.approx((0.0135, 0.508), abs=1e-3)


def test_the_kind_follows_from_the_scores():
    right = mean_of([1, 0, 1, 1])
    assert (right.mean, right.kind, right.n) == (0.75, "wilson", 4) and (right.low, right.high) == wilson(3, 4)
    parts = mean_of([0.5, 1.0, 0.25])
    assert parts.kind == "bootstrap" and 0.25 <= parts.low < parts.mean < parts.high <= 1
    # two answers that are half right are no proof of a half
    alike = mean_of([0.5, 0.5])
    assert alike.kind == "wilson" and (alike.low, alike.high) == wilson(1, 2)
    one = mean_of([0.5])
    assert (one.low, one.high, one.kind) == (None, None, "none")


def test_differences_are_of_pairs():
    values, base = [1, 0, 0, 0, 1], [1, 1, 1, 0, 0]
    found = difference_of(values, base)
    assert found.mean == pytest.approx(-0.2) and (found.low, found.high) == bonett_price(1, 2, 5)
    # the same scores leave no doubt in the bootstrap, but some where only a few pairs were seen
    same = difference_of([1, 1, 1], [1, 1, 1])
    assert same.low < 0 == same.mean < same.high
    parts = np.linspace(0, 0.9, 30)
    shifted = difference_of(parts, parts + 0.1)
    assert shifted.mean == pytest.approx(-0.1)
    assert (shifted.low, shifted.high) == pytest.approx(bonett_price(0, 3, 30)) and shifted.low < -0.1 < shifted.high
    # numbers that are no scores have no such interval
    shifted = difference_of(parts + 1, parts + 1.1)
    assert (shifted.low, shifted.high) == pytest.approx((-0.1, -0.1))
    with pytest.raises(ValueError, match="3 values and 2 of the baseline"):
        difference_of([1, 0, 1], [1, 0])
    with pytest.raises(ValueError, match="no values"):
        mean_of([])


def test_tasks_count_alike_whatever_their_instances():
    several, few = mean_of([1, 1, 1, 1, 1, 0]), mean_of([0, 0.5])
    found = mean_of_means([several, few])
    assert found.mean == pytest.approx((5 / 6 + 1 / 4) / 2) and found.n == 2
    assert found.low < found.mean < found.high and found.high - found.low < few.high - few.low
    # one mean is its own, and twice as many tasks tell as much as twice as many instances, nearly
    alone = mean_of_means([several])
    assert (alone.low, alone.high) == pytest.approx((several.low, several.high))
    half = mean_of([1, 0] * 100)
    assert mean_of_means([half, half]).low == pytest.approx(mean_of([1, 0] * 200).low, abs=1e-3)
    # where all are right, there is doubt nevertheless
    assert mean_of_means([mean_of([1, 1, 1])] * 2).low < 0.9
    assert mean_of_means([several, mean_of([0.5])]).low is None


def test_the_bootstrap_holds_the_mean_about_as_often_as_it_says():
    rng, n_held = np.random.default_rng(1), 0
    for _ in range(200):
        found = mean_of(rng.beta(2, 5, size=40))
        n_held += found.low <= 2 / 7 <= found.high
    assert 0.89 <= n_held / 200 <= 0.99
