"""How many latent channels every side of every layer gets, within a budget of bytes per token.

Ranks move in steps of the kernels' tile. All allocators end in `allocate_ranks`, which spends the budget to the last
step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from math import log

import torch

Ranks = dict[Hashable, int]


@dataclass(frozen=True)
class Side:
    """What an allocator knows of the keys or values of one layer.

    Attributes:
        layer_idx: depth of the layer.
        saves: loss that every direction saves, summed over the groups, `[n]`, descending.
        sensitivity: how much the model's loss reacts to this side (Fisher information).
        condition: ratio of the largest to the smallest singular value of the projection's weight.
        cost: bytes per token at a rank.
        step: ranks are multiples of this, or all `n`.
    """

    layer_idx: int
    saves: torch.Tensor
    sensitivity: float
    condition: float
    cost: Callable[[int], float]
    step: int

    @property
    def width(self) -> int:
        """Directions there are: `n`."""
        return self.saves.shape[0]

    def measured(self, losses: dict[int, float]) -> Side:
        """This side with what directions save corrected by measured losses of the model, by rank.

        Between two measured ranks the loss goes as a power of the energy that is left out.
        """
        tail = self.saves.flip(0).cumsum(0).flip(0).double()  # [n], energy left out by the ranks 0 .. n - 1
        floor = float(tail[0]) * 1e-9
        points = sorted((log(max(float(tail[rank]), floor)), rank) for rank in losses)
        x = torch.tensor([at for at, _ in points], dtype=torch.float64)
        y = torch.tensor([log(max(losses[rank], 1e-9)) for _, rank in points], dtype=torch.float64)
        # more left out never costs less, whatever noise says
        y = y.cummax(0).values
        at = tail.clamp(min=floor).log()
        i = torch.searchsorted(x, at).clamp(1, len(points) - 1)
        slope = ((y[i] - y[i - 1]) / (x[i] - x[i - 1]).clamp(min=1e-9)).clamp(0, 4)
        inside = y[i - 1] + slope * (at - x[i - 1])
        # beyond the measured ranks the loss is taken to be proportional to the energy
        loss = torch.where(at < x[0], y[0] + (at - x[0]), torch.where(at > x[-1], y[-1] + (at - x[-1]), inside)).exp()
        return replace(self, saves=loss - torch.cat([loss[1:], loss.new_zeros(1)]))

    def rounded(self, rank: float) -> int:
        """The nearest rank that is allowed."""
        return int(min(max(round(rank / self.step), 1) * self.step, self.width))

    def more(self, rank: int) -> int:
        return min(rank + self.step, self.width)

    def gain(self, low: int, high: int) -> float:
        """Loss saved per byte by going from one rank to a higher one."""
        return float(self.saves[low:high].sum()) / max(self.cost(high) - self.cost(low), 1e-9)


Sides = dict[Hashable, Side]


def greedy(sides: Sides, budget: float) -> Ranks:
    """Add rank wherever it saves the most loss per byte. Ours."""
    ranks = {key: side.rounded(0) for key, side in sides.items()}
    return allocate_ranks(sides, ranks, budget, lambda key, low, high: sides[key].gain(low, high))


def uniform(sides: Sides, budget: float) -> Ranks:
    """Ranks that are one share of the channels everywhere."""
    return _proportional(sides, budget, {key: side.width for key, side in sides.items()})


def fisher(sides: Sides, budget: float) -> Ranks:
    """In proportion to the sensitivity (Palu, arXiv 2407.21118, Fisher information search)."""
    return _proportional(sides, budget, {key: side.width * side.sensitivity for key, side in sides.items()})


def condition(sides: Sides, budget: float) -> Ranks:
    """Less the deeper, by the cumulative condition number of what follows (LoRC, arXiv 2410.03111).

    The deepest layer keeps half of what the shallowest does.
    """
    layers = sorted({side.layer_idx for side in sides.values()}, reverse=True)
    total, cumulative = 0.0, {}
    for layer in layers:
        total += sum(log(side.condition) for side in sides.values() if side.layer_idx == layer)
        cumulative[layer] = total
    low, high = min(cumulative.values()), max(cumulative.values())
    share = {i: 1 - 0.5 * (high - value) / max(high - low, 1e-9) for i, value in cumulative.items()}
    return _proportional(sides, budget, {key: side.width * share[side.layer_idx] for key, side in sides.items()})


def _proportional(sides: Sides, budget: float, weight: dict) -> Ranks:
    """Ranks in proportion to `weight`, as large as the budget allows."""
    low, high = 0.0, max(side.width / max(weight[key], 1e-30) for key, side in sides.items())
    for _ in range(100):
        middle = (low + high) / 2
        ranks = {key: side.rounded(middle * weight[key]) for key, side in sides.items()}
        if _bytes(sides, ranks) > budget:
            high = middle
        else:
            low = middle
    ranks = {key: side.rounded(low * weight[key]) for key, side in sides.items()}
    # what rounding left over goes to whoever lacks most
    return allocate_ranks(sides, ranks, budget, lambda key, rank, _: low * weight[key] - rank)


def allocate_ranks(sides: Sides, ranks: Ranks, budget: float, gain: Callable[[Hashable, int, int], float]) -> Ranks:
    """Add the step of the largest `gain(key, low, high)` that still fits, until none does.

    Raises:
        ValueError: the budget does not even pay for these ranks.
    """
    ranks, spent = dict(ranks), _bytes(sides, ranks)
    if spent > budget + 1e-6:
        raise ValueError(f"{budget:.0f} bytes per token do not pay for one step of rank everywhere ({spent:.0f} bytes)")
    while True:
        fitting = []
        for key, side in sides.items():
            low, high = ranks[key], side.more(ranks[key])
            price = side.cost(high) - side.cost(low)
            if high > low and spent + price <= budget + 1e-6:
                fitting.append((gain(key, low, high), price, key, high))
        if not fitting:
            return ranks
        _, price, key, high = max(fitting, key=lambda entry: entry[0])
        ranks[key], spent = high, spent + price


def _bytes(sides: Sides, ranks: Ranks) -> float:
    return sum(side.cost(ranks[key]) for key, side in sides.items())


# "measured" is greedy over sides whose losses were measured
ALLOCATORS = {"measured": greedy, "greedy": greedy, "uniform": uniform, "fisher": fisher, "condition": condition}
