"""A budget of bytes shared out among layers: the steepest steps of every layer's convex hull first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_kvcache.tuning.menu import Choice


@dataclass(frozen=True)
class Offer:
    """A choice of one layer.

    Attributes:
        nbytes: that it takes.
        loss: that it causes.
        choice: what the layer is made of.
    """

    nbytes: float
    loss: float
    choice: Choice


def hull(offers: Sequence[Offer]) -> list[Offer]:
    """The offers that are best at some price of a byte, from the smallest on: each step saves less than the last."""
    found: list[Offer] = []
    for offer in sorted(offers, key=lambda o: (o.nbytes, o.loss)):
        if found and offer.loss >= found[-1].loss:
            continue
        while len(found) > 1 and _gain(found[-1], offer) >= _gain(found[-2], found[-1]):
            found.pop()
        found.append(offer)
    return found


def _gain(one: Offer, other: Offer) -> float:
    """Loss saved per byte."""
    return (one.loss - other.loss) / max(other.nbytes - one.nbytes, 1e-9)


def allocate(layers: Sequence[Sequence[Offer]], most_bytes: float) -> list[Choice]:
    """One choice per layer that together take at most `most_bytes` and lose little.

    Layers begin with the smallest offer on their hull; then the step that saves most per byte is taken, again and
    again, while it fits. That is the best there is for the bytes it takes (a price per byte, the same for all layers);
    what one step more would cost is left over.

    Raises:
        ValueError: not even the smallest offers fit.
    """
    hulls = [hull(offers) for offers in layers]
    at, used = [0] * len(hulls), sum(own[0].nbytes for own in hulls)
    if used > most_bytes:
        raise ValueError(f"the smallest caches on offer take {used:,.0f} bytes, which is above {most_bytes:,.0f}")
    steps = sorted(
        ((_gain(own[n], own[n + 1]), -i, -n) for i, own in enumerate(hulls) for n in range(len(own) - 1)), reverse=True
    )
    for _, i, n in steps:
        i, n = -i, -n
        more = hulls[i][n + 1].nbytes - hulls[i][n].nbytes
        # a layer whose step did not fit has no later one
        if at[i] == n and used + more <= most_bytes:
            at[i], used = n + 1, used + more
    return [own[n].choice for own, n in zip(hulls, at, strict=True)]


def uniform(layers: Sequence[Sequence[Offer]], most_bytes: float, n: int) -> list[Choice]:
    """The `n` choices that lose least when all layers make the same, among those that fit."""
    totals: dict[Choice, list[float]] = {}
    for offers in layers:
        for offer in offers:
            total = totals.setdefault(offer.choice, [0.0, 0.0])
            total[0] += offer.nbytes
            total[1] += offer.loss
    offered = [{offer.choice for offer in offers} for offers in layers]
    totals = {choice: total for choice, total in totals.items() if all(choice in own for own in offered)}
    fits = [(loss, i, choice) for i, (choice, (size, loss)) in enumerate(totals.items()) if size <= most_bytes]
    return [choice for *_, choice in sorted(fits)[:n]]
