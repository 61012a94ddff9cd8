"""What dominates what, and which level of compression a cache belongs to."""

import pytest

from hf_kvcache.eval.compare import Row
from hf_kvcache.eval.kl_front import as_markdown, kl_front
from hf_kvcache.eval.pareto import dominators, level_of


@pytest.mark.parametrize(
    "share, level",
    [(1.06, 1), (0.72, 1), (0.70, 2), (0.36, 2), (0.35, 4), (0.18, 4), (0.17, 8), (0.08, 16), (0.01, 16)],
)
def test_levels_are_the_nearest(share, level):
    assert level_of(share) == level


def beaten(sizes, scores):
    return dominators(sizes, lambda a, b: None if None in (scores[a], scores[b]) else scores[a] - scores[b])


def test_the_front_has_no_dominator():
    # the third is worse than the fourth, which is smaller; the last is smallest and worst
    assert beaten([1.0, 0.5, 0.4, 0.3, 0.1], [1.0, 0.9, 0.5, 0.8, 0.2]) == [None, None, 3, None, None]


def test_the_best_dominator_is_named_and_of_equals_the_smallest():
    assert beaten([1.0, 0.5, 0.4, 0.3], [0.5, 0.9, 0.9, 0.6]) == [2, 2, None, None]


def test_bytes_that_differ_little_are_the_same():
    assert beaten([0.250, 0.252], [0.5, 0.6]) == [1, None]
    assert beaten([0.250, 0.252], [0.6, 0.6]) == [None, None]
    assert beaten([0.250, 0.260], [0.5, 0.6]) == [None, None]


def test_what_cannot_be_compared_dominates_nothing():
    assert beaten([0.5, 0.2], [0.1, None]) == [None, None]


def test_kl_of_a_comparison():
    rows = [
        Row("dynamic", True, bytes_ratio=1.0, kl=0.0, speedup=1.0),
        Row("quant", False, bytes_ratio=0.3, kl=0.01, speedup=1.5),
        Row("keydiff", False, bytes_ratio=0.31, kl=0.2),
        Row("broken", False, error="RuntimeError: no"),
    ]
    points = kl_front(rows)
    assert [(point.cache, point.level, point.beaten_by) for point in points] == [
        ("dynamic", 1, None),
        ("quant", 4, None),
        ("keydiff", 4, "quant"),
    ]
    assert "| 4× | `keydiff` | 0.310 | 0.2000 | – | `quant`, 0.0100 |" in as_markdown(points)
