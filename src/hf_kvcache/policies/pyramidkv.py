"""PyramidKV: SnapKV with more rows for the lower layers, and fewer for the upper ones."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_kvcache.policies.snapkv import SnapKV


@dataclass
class PyramidKV(SnapKV):
    """SnapKV's score under budgets that fall linearly from the first layer to the last (PyramidKV, arXiv 2406.02069).

    With `C` for the budget and `w` for the rows that always stay, the last layer chooses `least = (C - w) / beta`
    rows and the first `most = 2 (C - w) - least`, so that the layers keep as many rows together as with `C` each.
    While the text is too short for `most`, the first layer takes all of it and the others share the rest, as in the
    published code. There `w` is the window; here it is `n_sink + n_recent`, so that no layer's budget is below that.
    The paper evicts after the prompt only, which is `decode=False`.

    Attributes:
        beta: how steep it is: by how much the last layer's choice is smaller than the mean.
    """

    beta: float = 20.0
    depth: tuple[int, int] = field(default=(0, 1), init=False, repr=False, compare=False)

    needs = frozenset({"model"})
    sets_layer_budgets = True

    def __post_init__(self):
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"PyramidKV: beta={self.beta} must be at least 1")

    def for_model(self, context):
        bound = super().for_model(context)
        bound.depth = context.depth
        return bound

    def tokens_to_keep(self, tokens_seen: int) -> int:
        always = self.n_sink + self.n_recent
        mean = super().tokens_to_keep(tokens_seen) - always
        most = min(2 * mean - mean / self.beta, max(tokens_seen - always, mean))
        place, n_layers = self.depth
        return always + _below(place + 1, n_layers, mean, most) - _below(place, n_layers, mean, most)


def _below(n: int, n_layers: int, mean: int, most: float) -> int:
    """What the first `n` layers choose together: rounded here, so that all of them choose `n_layers * mean`."""
    step = 2 * (most - mean) / max(n_layers - 1, 1)
    return round(n * most - step * n * (n - 1) / 2) if n_layers > 1 else n * mean
