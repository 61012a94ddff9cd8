"""Attention of a few queries over dense rows, the query heads of a KV head together."""

from __future__ import annotations

import torch

from hf_kvcache.kernels import select

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


def check_operands(q, k, v, mask, n_rows=None):
    """Raise ValueError unless q, k, v and mask describe one attention call over `n_rows` rows (default: those of k)."""
    n_rows = k.shape[2] if n_rows is None else n_rows
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError("q, k and v must be [B, H, rows, D]")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit together")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"head size of q is {q.shape[-1]}, of k {k.shape[-1]}")
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}")
    if mask is not None:
        B, S = q.shape[0], q.shape[2]
        sizes_fit = mask.dim() == 4 and mask.shape[0] in (1, B) and mask.shape[1] in (1, k.shape[1])
        if mask.dtype != torch.bool or not sizes_fit or mask.shape[2:] != (S, n_rows):
            wanted = f"[{B}|1, {k.shape[1]}|1, {S}, {n_rows}]"
            raise ValueError(f"mask must be bool {wanted}, got {mask.dtype} {list(mask.shape)}")
