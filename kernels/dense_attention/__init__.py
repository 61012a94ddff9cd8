"""Attention of a few queries over dense rows, the query heads of a KV head together."""

from __future__ import annotations

import torch

from hf_kvcache.kernels import check_operands, select

__all__ = ["dense_attention"]


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over dense keys and values (Flash-Decoding, Dao et al. 2023).

    Args:
        q: queries `[B, Hq, S, D]`, float16, bfloat16, float32 or float64.
        k: keys `[B, Hkv, N, D]` in the dtype of `q`; rows contiguous, any batch and head stride.
        v: values `[B, Hkv, N, Dv]`, likewise; their head size may be another.
        scaling: factor on the scores.
        mask: boolean `[B | 1, Hkv | 1, S, N]`, True where a query may look; None for everything.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2, section 2).

    Returns:
        The output `[B, Hq, S, Dv]` in the dtype of `q` and the natural log-sum-exp of the scores, scaled and capped,
        `[B, Hq, S]` in float32 (float64 for float64 queries). A query that sees nothing gets zeros and `-inf`.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    check_operands(q, k, v, mask)
    run = select("dense_attention", q.device, (q, v))
    return run(q, k, v, scaling=scaling, mask=mask, softcap=softcap)
