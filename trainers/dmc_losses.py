"""What is measured of a batch: losses of rows, as many at a time as memory holds, and shares of tokens."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOSS_ELEMENTS = 2**24  # logits whose loss is computed at a time


def by_rows(losses, weights: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
    """Weighted sum of losses of rows, so many at a time that their float32 copies fit memory.

    Args:
        losses: of some rows, `[n]`.
        weights: `[N]`.
        rows: what it takes, logits first, `[N, ...]`.
    """
    n = max(1, LOSS_ELEMENTS // rows[0].shape[-1])
    if len(weights) <= n:
        return (losses(*rows) * weights).sum()
    parts = zip(*(x.split(n) for x in (weights, *rows)), strict=True)
    return sum((checkpoint(losses, *part, use_reentrant=False) * w).sum() for w, *part in parts)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Float32 `[N]`."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


@torch.no_grad()
def hard_share(call) -> torch.Tensor:
    """Share of real tokens that inference would not keep, by head, `[Hkv]`."""
    alpha = call.alpha.float()
    if call.is_real is None:
        return alpha.mean((0, 2))
    real = call.is_real.unsqueeze(1).float()
    return (alpha * real).sum((0, 2)) / real.sum().clamp(min=1)


def ratio_of(share: torch.Tensor) -> float:
    """Tokens per row, where a share of the tokens has none."""
    return round(1 / max(1e-4, 1 - share.mean().item()), 3)
