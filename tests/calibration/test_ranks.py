"""Rank allocation: budgets are spent to the last step, and where it pays."""

import pytest
import torch

from hf_kvcache.calibration.ranks import ALLOCATORS, Side, condition, fisher, greedy, uniform


def side(layer=0, decay=0.9, width=128, price=2.0, step=16, sensitivity=1.0, weight_condition=10.0, scale=1.0):
    saves = scale * decay ** torch.arange(width, dtype=torch.float64)
    return Side(layer, saves, sensitivity, weight_condition, lambda rank: price * rank, step)


def model_of(n_layers=8):
    """Keys of eight heads and joint values, as a Llama-3-8B layer has them, no two layers alike."""
    sides = {}
    for i in range(n_layers):
        decay = 0.9 + 0.01 * i
        sides[i, "k"] = side(i, decay, 128, 16.0, sensitivity=1 + i, weight_condition=10.0 + i)
        sides[i, "v"] = side(i, 0.995 + 0.0005 * i, 1024, 2.0, sensitivity=3 + i)
    return sides


def spent(sides, ranks):
    return sum(s.cost(ranks[key]) for key, s in sides.items())


def lost(sides, ranks):
    return sum(float(s.saves[ranks[key] :].sum()) for key, s in sides.items())


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", ALLOCATORS)
def test_the_budget_is_met_to_a_percent_in_steps(name, share):
    sides = model_of()
    whole = spent(sides, {key: s.width for key, s in sides.items()})
    ranks = ALLOCATORS[name](sides, share * whole)
    assert 0.99 * share * whole < spent(sides, ranks) <= share * whole
    for key, rank in ranks.items():
        assert 16 <= rank <= sides[key].width and (rank % 16 == 0 or rank == sides[key].width)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_greedy_loses_least(share):
    sides = model_of()
    budget = share * spent(sides, {key: s.width for key, s in sides.items()})
    best = lost(sides, greedy(sides, budget))
    for other in (uniform, fisher, condition):
        assert best <= lost(sides, other(sides, budget))


def test_greedy_is_optimal_where_everything_can_be_tried():
    sides = {i: side(i, decay, width=8, price=1.0, step=1, scale=scale) for i, (decay, scale) in enumerate(
        [(0.5, 1.0), (0.9, 0.3), (0.7, 2.0)]
    )}  # fmt: skip
    best = min(
        (lost(sides, dict(enumerate((a, b, c)))), (a, b, c))
        for a in range(1, 9)
        for b in range(1, 9)
        for c in range(1, 9)
        if a + b + c <= 12
    )
    assert tuple(greedy(sides, 12.0).values()) == best[1]


def test_uniform_is_uniform():
    ranks = uniform({i: side(i, 0.8 + 0.02 * i) for i in range(4)}, 4 * 2.0 * 64)
    assert set(ranks.values()) == {64}


def test_fisher_follows_sensitivity_and_condition_depth():
    sides = {i: side(i, sensitivity=s) for i, s in enumerate((1.0, 2.0, 4.0))}
    assert list(fisher(sides, 2.0 * 112).values()) == [16, 32, 64]
    deep = condition({i: side(i) for i in range(4)}, 4 * 2.0 * 64)
    assert list(deep.values()) == sorted(deep.values(), reverse=True) and deep[0] > deep[3]


def test_a_budget_that_pays_for_nothing():
    with pytest.raises(ValueError, match="do not pay for one step"):
        greedy(model_of(), 100)


def test_measured_losses_correct_the_estimate():
    estimated = side(decay=0.95)
    # in truth the loss falls twice as fast as the energy that is left out
    tail = estimated.saves.flip(0).cumsum(0).flip(0)
    measured = estimated.measured({rank: float(tail[rank]) ** 2 for rank in (16, 32, 64, 96)})
    corrected = measured.saves.flip(0).cumsum(0).flip(0)
    for rank in (16, 24, 48, 80, 96):
        assert float(corrected[rank]) == pytest.approx(float(tail[rank]) ** 2, rel=1e-6)
    # noise may not make a larger rank look worse
    noisy = estimated.measured({16: 0.1, 32: 0.05, 64: 0.06, 96: 0.01})
    assert (noisy.saves >= 0).all()
