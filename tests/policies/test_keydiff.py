"""KeyDiff: its score is the formula, and the kept rows are the best-scored ones."""

import pytest
import torch
from cases import KNOBS

import hf_kvcache as kv
from hf_kvcache.attention.call import AttentionCall


def filled(policy, n=50, seed=0, batch=2, mask=None):
    layer = kv.KVLayer(0, policy=policy)
    k = torch.randn(batch, 2, n, 8, generator=torch.Generator().manual_seed(seed)) + 0.5
    view = layer.append(k, k)
    if mask is not None:
        layer.prepare(AttentionCall(view, None, mask))
    return layer, view, k


def formula(k):
    """Minus the cosine between each key and the mean of the normalised keys, one head at a time."""
    unit = k / k.norm(dim=-1, keepdim=True)
    anchor = unit.mean(0)
    return -(k @ anchor) / (k.norm(dim=-1) * anchor.norm())


def test_score_is_the_formula():
    policy = kv.KeyDiff(budget=20, **KNOBS)
    _, view, k = filled(policy)
    scores = policy.score(view)
    for b in range(2):
        for h in range(2):
            assert torch.allclose(scores[b, h], formula(k[b, h]), atol=1e-6)


def test_padding_has_no_say():
    policy = kv.KeyDiff(budget=20, **KNOBS)
    mask = torch.ones(2, 1, 50, 50, dtype=torch.bool)
    mask[0, ..., :13] = False
    _, view, k = filled(policy, mask=mask)
    scores = policy.score(view)
    assert torch.allclose(scores[0, 1, 13:], formula(k[0, 1, 13:]), atol=1e-6)
    assert torch.allclose(scores[1, 1], formula(k[1, 1]), atol=1e-6)


@pytest.mark.parametrize("knobs", [dict(budget=20), dict(ratio=0.4)], ids=["budget", "ratio"])
def test_keeps_sinks_recents_and_the_best_scored(knobs):
    layer, view, k = filled(kv.KeyDiff(**knobs, **KNOBS))
    layer.compress(AttentionCall(view, k[:, :, -2:]))
    for b in range(2):
        for h in range(2):
            scores = formula(k[b, h])
            scores[:2] = scores[-8:] = float("inf")
            expected = scores.topk(20).indices.sort().values
            assert layer.store.positions[b, h].tolist() == expected.tolist()
            assert torch.equal(layer.store.dense["k"][b, h], k[b, h, expected])
    # heads choose for themselves
    assert not torch.equal(layer.store.positions[0, 0], layer.store.positions[0, 1])


def test_packed_rows_are_scored_as_they_read():
    policy = kv.KeyDiff(budget=60, **KNOBS)
    side = kv.Quantize(8, axis="token")
    layer = kv.KVLayer(0, side, side, policy, window=4)
    k = torch.randn(1, 2, 100, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    layer.compress(AttentionCall(layer.append(k[:, :, :60], k[:, :, :60]), k))
    view = layer.append(k[:, :, 60:], k[:, :, 60:])
    assert layer.store.n_packed == 32
    scores = policy.score(view)
    assert torch.allclose(scores[0, 0], formula(k[0, 0]), atol=0.02)
    layer.compress(AttentionCall(view, k[:, :, 60:]))
    # a chunk larger than the window is packed before it is chosen from: budget and sinks hold
    assert layer.store.n_kept == 60
    positions = layer.store.positions[0, 0]
    assert positions[:2].tolist() == [0, 1]
    assert positions.tolist() == sorted(positions.tolist()) and positions[-8:].tolist() == list(range(92, 100))
    rows = layer.store.logical_rows()[0][0, 0]
    assert torch.allclose(rows, k[0, 0, positions.long()], atol=0.05)
