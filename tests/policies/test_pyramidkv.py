"""PyramidKV: layer budgets fall along a line, and together they are what was asked for."""

from types import SimpleNamespace

import cases
import pytest
import torch

import hf_kvcache as kv
from hf_kvcache.policies import PyramidKV, SnapKV
from hf_kvcache.shards import WHOLE

KNOBS = dict(n_sink=4, n_recent=8, n_queries=8)


def budgets(policy, n_layers, tokens_seen):
    layers = [policy.for_model(SimpleNamespace(depth=(i, n_layers), shard=WHOLE)) for i in range(n_layers)]
    return [layer.tokens_to_keep(tokens_seen) for layer in layers]


def test_first_and_last_layer_are_the_papers():
    found = budgets(PyramidKV(budget=212, **KNOBS), 5, 10_000)
    # C - w = 200: least 200 / 20, most 400 - 10
    assert [n - 12 for n in found] == [390, 295, 200, 105, 10]
    assert budgets(PyramidKV(budget=212, beta=1, **KNOBS), 5, 10_000) == [212] * 5


@pytest.mark.parametrize("n_layers", [1, 2, 3, 16, 28, 33])
@pytest.mark.parametrize("tokens_seen", [50, 101, 150, 190, 5000])
@pytest.mark.parametrize("size", [dict(budget=101), dict(budget=12), dict(ratio=0.3), dict(ratio=1.0)], ids=str)
def test_the_total_is_preserved(size, tokens_seen, n_layers):
    policy = PyramidKV(**size, **KNOBS)
    found = budgets(policy, n_layers, tokens_seen)
    assert sum(found) == n_layers * SnapKV(**size, **KNOBS).tokens_to_keep(tokens_seen)
    # rounding may put a row one layer too low
    assert all(a >= b - 1 for a, b in zip(found, found[1:]))
    assert min(found) >= policy.n_sink + policy.n_recent


def test_no_layer_is_given_more_than_there_is():
    # most would be 390, but only 238 can be chosen
    found = budgets(PyramidKV(budget=212, **KNOBS), 5, 250)
    assert found[0] == 250 and sum(found) == 5 * 212


def test_score_is_snapkvs():
    from toys import feed

    ours = feed(PyramidKV(budget=100, **KNOBS)).view
    theirs = feed(SnapKV(budget=100, **KNOBS)).view
    assert torch.equal(ours.layer.policy.score(ours), theirs.layer.policy.score(theirs))


def test_layers_of_a_model_keep_their_own_number():
    cache = kv.KVCache(policy=PyramidKV(budget=24, n_sink=2, n_recent=4, n_queries=4, interval=4))
    cases.replay(cases.tiny_model(), cache, cases.prompt(2, 60), [60])
    first, last = (layer.store.n_kept for layer in cache.layers)
    # 18 to choose: least 0.9, most 35.1
    assert (first, last) == (6 + 35, 6 + 1)
    assert cache.policy.depth == (0, 1)


def test_beta_is_checked():
    with pytest.raises(ValueError, match="beta=0.5"):
        PyramidKV(budget=100, beta=0.5)
