"""SnapKV: votes of the window, pooled over neighbours; the window stays."""

import pytest
import torch
from toys import assert_scores, feed, pairs

import hf_kvcache as kv
from hf_kvcache.attention.call import AttentionCall
from hf_kvcache.policies import SnapKV
from hf_kvcache.policies.window import pool


def votes(toy, b, h, window):
    """Weights of the last `window` queries, summed, meaned over the group; none for the window."""
    got = toy.weights(b, h)[:, -window:].sum(1).mean(0)
    got[-window:] = 0
    return got


def pooled(x, kernel, how):
    """Max or mean of every element's neighbourhood, where zeros stand beyond the edges."""
    half = kernel // 2
    padded = torch.cat([torch.zeros(half), x, torch.zeros(half)])
    reduce = torch.amax if how == "max" else torch.mean
    return torch.stack([reduce(padded[i : i + kernel], 0) for i in range(len(x))])


@pytest.mark.parametrize("sizes", [[50], [7] * 7 + [1], [20] + [1] * 30], ids=["one-shot", "chunked", "decode"])
@pytest.mark.parametrize("kernel, pooling", [(7, "max"), (5, "avg"), (1, "max")])
def test_score_is_the_formula(kernel, pooling, sizes):
    policy = SnapKV(budget=100, n_queries=8, kernel=kernel, pooling=pooling)
    toy = feed(policy, sizes=sizes, softcap=2.0)

    def formula(toy, b, h):
        got = votes(toy, b, h, 8)
        return pooled(got, kernel, pooling) + 1e-4 * got

    assert_scores(toy, formula)


def test_window_and_the_best_stay():
    toy = feed(SnapKV(budget=20, n_queries=8, n_sink=2, n_recent=0), pads=(0, 0))
    for b, h in pairs(toy):
        got = votes(toy, b, h, 8)
        scores = pooled(got, 7, "max")
        kept = toy.layer.store.positions[b, h].long()
        assert kept[:2].tolist() == [0, 1] and kept[-8:].tolist() == list(range(42, 50))
        gone = torch.ones(50, dtype=torch.bool)
        gone[kept] = False
        assert scores[kept[2:-8]].min() >= scores[gone].max()
        # neighbours share their maximum: of those the ones with most votes stay
        tied = scores == scores[gone].max()
        stayed = got[kept][tied[kept]]
        assert not len(stayed) or stayed.min() >= got[gone & tied].max()


def test_pools_in_the_order_of_positions():
    # packed rows stand before the sinks in view order
    positions = torch.tensor([[[2, 3, 4, 5, 0, 1, 6, 7]]], dtype=torch.int32)
    scores = torch.tensor([[[0.0, 0, 0, 0, 9, 0, 0, 1]]])
    assert pool(scores, positions, 3)[0, 0].tolist() == [0, 0, 0, 0, 9, 9, 1, 1]


def test_packed_sinks_do_not_leak():
    side = kv.Quantize(8, axis="token")
    policy = SnapKV(budget=100, n_queries=8, n_sink=2)
    layer = kv.KVLayer(0, side, side, policy, window=4, n_sink=2)
    k = torch.randn(1, 2, 60, 16, generator=torch.Generator().manual_seed(0))
    q = torch.randn(1, 4, 60, 16, generator=torch.Generator().manual_seed(1))
    dense = kv.KVLayer(0, policy=policy)
    for one in (layer, dense):
        view = one.append(k, k)
        one.compress(AttentionCall(view, q))
    view.layer = layer
    assert layer.store.n_packed == 32
    packed = policy.score(view).gather(-1, view.positions.argsort(-1))
    view.layer = dense
    assert torch.allclose(packed, policy.score(view), atol=5e-3)


def test_window_is_part_of_what_stays():
    policy = SnapKV(budget=64)
    assert policy.n_queries == 32 and policy.n_recent == 32
    assert SnapKV(budget=64, n_queries=16, n_recent=4).n_recent == 16
    with pytest.raises(ValueError, match="budget=32"):
        SnapKV(budget=32)
    with pytest.raises(ValueError, match="kernel=4"):
        SnapKV(budget=64, kernel=4)
    with pytest.raises(ValueError, match="median"):
        SnapKV(budget=64, pooling="median")
