"""Which rows a query sees while decisions are relaxed: the parallel form of training."""

from __future__ import annotations

import torch


def hiding_bias(left: torch.Tensor, delay: int) -> torch.Tensor:
    """What is added to scores: `log(1 - p_{t+1})` for the key of token `t`, once the query is further than `delay`.

    The newest key is always seen as it is: `delay` 0 leaves the diagonal alone.

    Args:
        left: `log(1 - p)`, `[B, Hkv, T]`; that of a token speaks of the key before it.
        delay: tokens for which a key stays.

    Returns:
        `[B, Hkv, T, T]`, `-inf` for keys after the query.
    """
    T = left.shape[-1]
    of_key = torch.nn.functional.pad(left[..., 1:], (0, 1)).unsqueeze(-2)
    behind = torch.arange(T, device=left.device).view(-1, 1) - torch.arange(T, device=left.device)
    bias = torch.where(behind > delay, of_key, torch.zeros((), dtype=left.dtype, device=left.device))
    return bias.masked_fill(behind < 0, float("-inf"))


def expiry(alpha: torch.Tensor, is_real: torch.Tensor | None, start: int, delay: int) -> torch.Tensor:
    """The last position at which every new token's row is seen, int32 `[B, Hkv, S]`; `FOREVER` while nothing speaks
    against it, -1 for padding.

    Args:
        alpha: decisions, boolean `[B, Hkv, S]`; that of a token speaks of the row before it.
        is_real: `[B, S]`, or None when nothing is padded.
        start: position of the first token.
        delay: tokens for which a row stays.
    """
    S = alpha.shape[-1]
    position = torch.arange(start, start + S, dtype=torch.int32, device=alpha.device)
    condemned = torch.nn.functional.pad(alpha[..., 1:], (0, 1))
    seen_until = torch.where(condemned, position + delay, FOREVER)
    return seen_until if is_real is None else torch.where(is_real.unsqueeze(1), seen_until, -1)


FOREVER = torch.iinfo(torch.int32).max
