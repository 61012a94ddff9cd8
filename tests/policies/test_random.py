"""Random: uniform, repeatable, and fair however often rows are evicted."""

import torch
from toys import feed

from hf_kvcache.attention.call import AttentionCall
from hf_kvcache.policies import Random

KNOBS = dict(n_sink=2, n_recent=4)


def test_draws_are_uniform_and_differ_by_head():
    scores = feed(Random(budget=5000), n=4000, pads=(0,)).policy.score(feed(Random(budget=5000), 4000, (0,)).view)
    assert scores.min() > 0 and scores.max() < 1
    assert abs(scores.mean() - 0.5) < 0.02 and abs(scores.std() - 12**-0.5) < 0.02
    assert not torch.equal(scores[0, 0], scores[0, 1])


def test_draws_repeat_and_differ_by_seed():
    kept = [feed(Random(budget=20, seed=seed, **KNOBS)).layer.store.positions for seed in (0, 0, 1)]
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])


def test_tokens_keep_their_luck():
    toy = feed(Random(budget=30, **KNOBS), sizes=[50])
    luck, positions = toy.view.state("luck").clone(), toy.view.positions.clone()
    again = toy.policy.score(toy.view)
    assert torch.equal(luck, again) and (luck[0] > 0).all()
    k = torch.randn(2, 2, 1, 8)
    toy.layer.compress(AttentionCall(toy.layer.append(k, k), torch.randn(2, 6, 1, 8)))
    assert torch.equal(toy.policy.score(toy.view)[..., :30], luck)
    assert torch.equal(toy.view.positions[..., :30], positions)


def test_evicting_often_does_not_favour_the_new():
    often = feed(Random(budget=206, interval=1, **KNOBS), n=2000, pads=(0,), sizes=[100] * 20).layer.store.positions
    # of 200 chosen among 1994 about half are of the first half
    old = ((often >= 2) & (often < 1000)).sum(-1).float().mean().item()
    assert 75 < old < 125
