"""Which channels of a row matter: the rules by which `Sparse` chooses (Mustafar, arXiv 2505.22913, section 2).

Each takes rows `x` `[B, Hkv, n, D]` and the newest queries of the layer, `[B, Hkv, s, G, D]` or None, and returns a
worth per element whose magnitude decides, broadcastable to `x`; None stands for the magnitude of `x` itself.
"""

from __future__ import annotations


def magnitude(x, queries):
    """Largest elements of every row: the method of the paper, for keys and values."""
    return None


def output_aware(x, queries):
    """Elements that move the scores of the newest queries most: `|k_i| * sum |q_i|` (its second rule for keys)."""
    return x.float() * queries.float().abs().sum((2, 3)).unsqueeze(2)


def think(x, queries):
    """Whole channels, by `mean(q_i^2) * mean(k_i^2)` over the rows packed together (ThinK, arXiv 2407.21018)."""
    return queries.float().square().mean((2, 3)).unsqueeze(2) * channels(x, None)


def channels(x, queries):
    """Whole channels, by `mean(x_i^2)` over the rows packed together: ThinK for values, which no query multiplies."""
    return x.float().square().mean(2, keepdim=True)


RULES = {"magnitude": magnitude, "output_aware": output_aware, "think": think, "channels": channels}
NEEDS_QUERIES = {"output_aware", "think"}
# values are weighted by one number per row, which changes no order within it
OF_VALUES = {"output_aware": "magnitude", "think": "channels"}
