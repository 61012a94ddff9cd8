"""Merging on eviction: evicted values are merged into the kept rows most like them, and nothing else changes."""

import pytest
import torch
from cases import generate, prompt, tiny_model
from toys import feed, pairs

import hf_kvcache as kv

KNOBS = dict(n_sink=2, n_recent=4)


def merged(toy, b, h, kept, values, weights, keys, similarity):
    """Values of the kept rows after merging, and how many rows each stands for, one row after another."""
    sums = {i: values[i] * weights[i] for i in kept}
    total = {i: weights[i] for i in kept}
    targets = [i for i in kept if i >= toy.pads[b] + 2]
    for i in range(toy.pads[b], len(keys)):
        if i in kept:
            continue
        cosines = torch.stack([torch.cosine_similarity(keys[i], keys[j], dim=0) for j in targets])
        if cosines.max() >= similarity:
            j = targets[int(cosines.argmax())]
            sums[j] = sums[j] + values[i] * weights[i]
            total[j] = total[j] + weights[i]
    return {i: sums[i] / total[i] for i in kept}, total


@pytest.mark.parametrize("similarity", [-1.0, 0.6, 1.1])
def test_values_are_means_of_what_was_folded_into_them(similarity):
    plain = kv.L2Norm(budget=20, **KNOBS)
    toy = feed(kv.Merge.over(plain, similarity=similarity), n=50, pads=(0, 13))
    alone = feed(plain, n=50, pads=(0, 13))
    positions = toy.layer.store.positions
    # merging does not change who stays
    assert torch.equal(positions, alone.layer.store.positions)
    assert torch.equal(toy.layer.store.dense["k"], alone.layer.store.dense["k"])
    n_merged = 0
    for b, h in pairs(toy):
        kept = positions[b, h].tolist()
        expected, total = merged(toy, b, h, kept, toy.v[b, h], torch.ones(50), toy.k[b, h], similarity)
        for row, i in enumerate(kept):
            assert torch.allclose(toy.layer.store.dense["v"][b, h, row], expected[i], atol=1e-5)
            assert toy.layer.store.dense["n_merged"][b, h, row] == total[i] - 1
        n_merged += sum(total.values()) - len(kept)
    every = sum(50 - n - 20 for n in toy.pads) * 2
    assert n_merged == {-1.0: every, 1.1: 0}.get(similarity, n_merged)
    assert 0 < n_merged < every or similarity != 0.6


def test_rows_count_for_all_they_stand_for():
    # the second eviction merges rows that others were merged into
    toy = feed(kv.Merge.over(kv.L2Norm(budget=20, **KNOBS), similarity=-1.0), n=70, pads=(0,), sizes=[50, 20])
    for h in range(2):
        n_merged = toy.layer.store.dense["n_merged"][0, h]
        # every token is accounted for once
        assert n_merged.sum() + 20 == 70
        # so the mean of all values, sinks apart, is kept
        rows = toy.layer.store.dense["v"][0, h]
        assert torch.allclose((rows * (1 + n_merged).unsqueeze(-1)).sum(0), toy.v[0, h].sum(0), atol=1e-3)


def test_through_a_model():
    cache = kv.EvictionCache("snapkv", budget=48, merge=True, interval=4)
    generate(tiny_model(), prompt(2, 90), cache, max_new_tokens=24)
    assert all(layer.store.state("n_merged").sum() > 0 for layer in cache.layers)
    assert all(layer.store.n_kept < 48 + 4 for layer in cache.layers)
