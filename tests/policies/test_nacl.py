"""NACL: a part by score, a part by lot."""

from types import SimpleNamespace

import pytest
import torch
from test_snapkv import votes
from toys import assert_scores, feed, pairs

from hf_kvcache.policies import NACL
from hf_kvcache.shards import WHOLE

KNOBS = dict(budget=22, n_queries=8, n_sink=2, n_recent=8)


def kept(policy, toy, tokens_seen=50):
    return policy.select(policy.score(toy.view), toy.view.positions, tokens_seen, 0)


@pytest.fixture
def toy():
    return feed(NACL(budget=100, n_queries=8, n_sink=2, n_recent=8), pads=(0, 0), softcap=2.0)


def test_score_is_the_formula(toy):
    assert_scores(toy, lambda toy, b, h: votes(toy, b, h, 8))


def test_counts_are_right(toy):
    rows = kept(NACL(**KNOBS), toy)
    assert rows.shape == (2, 2, 22)
    for b, h in pairs(toy):
        chosen = rows[b, h].tolist()
        assert chosen == sorted(set(chosen))
        assert chosen[:2] == [0, 1] and chosen[-8:] == list(range(42, 50))
        # 12 to choose: 4 by score, 8 by lot
        best = votes(toy, b, h, 8)[2:42].topk(12).indices + 2
        assert set(best[:4].tolist()) <= set(chosen)
        assert not set(best.tolist()) <= set(chosen)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_by_score_or_all_by_lot(toy, share):
    rows = kept(NACL(**KNOBS, random_share=share), toy)
    for b, h in pairs(toy):
        best = {*votes(toy, b, h, 8)[2:42].topk(12).indices.add(2).tolist(), 0, 1, *range(42, 50)}
        assert (set(rows[b, h].tolist()) == best) == (share == 0.0)


def test_draws_repeat_and_differ(toy):
    def of_layer(i, **knobs):
        return NACL(**KNOBS, **knobs).for_model(SimpleNamespace(layer_idx=i, shard=WHOLE))

    rows = kept(of_layer(1), toy)
    assert torch.equal(rows, kept(of_layer(1), toy))
    assert not torch.equal(rows, kept(of_layer(2), toy))
    assert not torch.equal(rows, kept(of_layer(1, seed=1), toy))
    # one head's draw is not the other's: leave scores out of it
    flat = of_layer(1, random_share=1.0).select(torch.zeros(1, 2, 50), toy.view.positions[:1], 50, 0)
    assert not torch.equal(flat[0, 0], flat[0, 1])


def test_draws_follow_the_softmax_of_the_scores():
    # one of six rows to choose, again and again: odds are e^1.5 to 5
    scores = torch.tensor([1.5, 0, 0, 0, 0, 0]).expand(1, 4000, 6)
    positions = torch.arange(6, dtype=torch.int32).expand(1, 4000, 6)
    policy = NACL(budget=2, n_queries=1, n_sink=0, n_recent=1, random_share=1.0)
    policy.n_recent, policy.budget = 0, 1
    rows = policy.select(scores, positions, 6, 0)
    share = (rows == 0).float().mean().item()
    assert share == pytest.approx(0.4727, abs=0.025)


def test_padding_is_not_drawn():
    toy = feed(NACL(**KNOBS), pads=(25, 40))
    positions = toy.layer.store.positions
    assert (positions[0] >= 25).all()
    # ten real tokens: the rest of the budget is padding
    assert all(positions[1, h].tolist() == [-1] * 12 + list(range(40, 50)) for h in range(2))


def test_fixed_rows_stay(toy):
    policy = NACL(**KNOBS)
    rows = policy.select(policy.score(toy.view), toy.view.positions, 50, 15)
    assert rows.shape == (2, 2, 22) and (rows[..., -15:] == torch.arange(35, 50)).all()


def test_share_is_checked():
    with pytest.raises(ValueError, match="random_share=-1"):
        NACL(**KNOBS, random_share=-1)
