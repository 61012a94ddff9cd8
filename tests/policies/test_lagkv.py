"""LagKV: rank inside a partition of how a row spreads in the range of the next partition."""

import pytest
import torch
from toys import assert_scores, feed, pairs

from hf_kvcache.policies import LagKV


def spread(rows, reference):
    """Softmax over `rows` `[L, D]` of their standard deviation after min-max normalisation by `reference`."""
    low, high = reference.min(0).values, reference.max(0).values
    return ((rows - low) / torch.where(high > low, high - low, 1)).std(-1).softmax(-1)


def formula(toy, b, h, lag=8, n_sink=2):
    _, k, v = toy.of(b, h)
    n = len(k)
    scores = 1 + torch.arange(n) / n
    n_parts = (n - n_sink) // lag
    for p in range(n_parts - 1):
        here, there = (slice(n_sink + i * lag, n_sink + (i + 1) * lag) for i in (p, p + 1))
        both = (spread(k[here], k[there]) + spread(v[here], v[there])) / 2
        scores[here] = (both.argsort().argsort() + p / n_parts) / lag
    return scores


@pytest.mark.parametrize("n, pads", [(50, (0, 13)), (58, (0, 1)), (20, (0, 3)), (10, (0, 6)), (4, (0, 3))], ids=str)
def test_score_is_the_formula(n, pads):
    toy = feed(LagKV(budget=100, lag=8, n_sink=2, n_recent=2), n=n, pads=pads)
    assert_scores(toy, formula, 1e-6)


def test_padding_may_hold_anything():
    toy = feed(LagKV(budget=100, lag=8, n_sink=2, n_recent=2), n=50, pads=(0, 13), fill=float("nan"))
    assert_scores(toy, formula, 1e-6)


def test_every_partition_keeps_its_share():
    toy = feed(LagKV(budget=30, lag=8, n_sink=2, n_recent=2), n=50, pads=(0, 0))
    for b, h in pairs(toy):
        kept = toy.layer.store.positions[b, h]
        assert kept[:2].tolist() == [0, 1] and kept[-8:].tolist() == list(range(42, 50))
        # five partitions share what the sinks and the last one leave
        assert [int(((kept[2:] - 2) // 8 == p).sum()) for p in range(5)] == [4] * 5


def test_channels_of_one_value_are_not_scaled():
    toy = feed(LagKV(budget=100, lag=8, n_sink=2, n_recent=2), n=50, pads=(0, 13))
    for rows in (toy.k, toy.layer.store.dense["k"]):
        rows[..., 20:, 0] = 0.5
    assert_scores(toy, formula, 1e-6)


def test_lag_is_checked():
    with pytest.raises(ValueError, match="lag=1"):
        LagKV(budget=100, lag=1)
