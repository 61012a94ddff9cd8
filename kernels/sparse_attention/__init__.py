"""Attention of a few queries over sparse rows, their values full or quantised, and a dense tail."""

from __future__ import annotations

import torch

from hf_kvcache.kernels import check_operands, select
from hf_kvcache.kernels.sparse_attention.rows import SparseRows

__all__ = ["SparseRows", "sparse_attention"]


def sparse_attention(
    q: torch.Tensor,
    keys: SparseRows,
    values: SparseRows,
    tail_k: torch.Tensor | None = None,
    tail_v: torch.Tensor | None = None,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over sparse keys and values without expanding them to memory, then over a dense tail.

    `softmax([q K_packed^T, q K_tail^T]) [V_packed; V_tail]` (Mustafar, arXiv 2505.22913, section 3).

    Args:
        q: queries `[B, Hq, S, D]`, float16, bfloat16, float32 or float64.
        keys: packed keys.
        values: packed values; `Dv` channels, which may be other than `D`.
        tail_k: dense keys `[B, Hkv, M, D]` that follow the packed rows, in the dtype of `q`, or None.
        tail_v: dense values `[B, Hkv, M, Dv]`, likewise.
        scaling: factor on the scores.
        mask: boolean `[B | 1, Hkv | 1, S, N + M]`, True where a query may look; None for everything.
        softcap: scores become `softcap * tanh(scores / softcap)`.

    Returns:
        The output `[B, Hq, S, Dv]` in the dtype of `q` and the natural log-sum-exp of the scores, scaled and capped,
        `[B, Hq, S]` in float32 (float64 for float64 queries). A query that sees nothing gets zeros and `-inf`.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    n_packed = keys.values.shape[2]
    if tail_k is None:
        widths = q.shape[-1], values.row_width(q.shape[-1])
        tail_k, tail_v = (q.new_empty(*keys.values.shape[:2], 0, width) for width in widths)
    check_operands(q, tail_k, tail_v, mask, n_packed + tail_k.shape[2])
    _check_rows("keys", keys, q, n_packed, q.shape[-1])
    _check_rows("values", values, q, n_packed, tail_v.shape[-1])
    run = select("sparse_attention", q.device, (q, keys, values))
    return run(q, keys, values, tail_k, tail_v, scaling=scaling, mask=mask, softcap=softcap)


def _check_rows(name, rows, q, n_packed, D):
    if rows.places is not None and rows.row_width(q.shape[-1]) != D:
        raise ValueError(f"{name}: sparse rows of {rows.row_width(q.shape[-1])} channels beside dense ones of {D}")
    if rows.values.shape[0] != q.shape[0] or rows.values.shape[2] != n_packed or rows.keep > D:
        raise ValueError(f"{name}: values {list(rows.values.shape)} do not fit {n_packed} rows of {D} channels")
    if rows.bits is None and rows.values.dtype != q.dtype:
        raise ValueError(f"{name}: values are {rows.values.dtype}, queries {q.dtype}")
    if rows.bits is not None and (rows.values.dtype != torch.int16 or rows.scale is None or rows.zero is None):
        raise ValueError(f"{name}: {rows.bits}-bit values are int16 codes with scale and zero")
    if rows.places is None:
        if rows.keep != D:
            raise ValueError(f"{name}: {rows.keep} of {D} channels need places")
        return
    wanted = (*rows.values.shape[:3], rows.keep if rows.layout == "index" else -(-D // 8))
    if rows.layout not in ("bitmap", "index") or rows.places.dtype != torch.uint8 or rows.places.shape != wanted:
        raise ValueError(f"{name}: places must be uint8 {list(wanted)} of layout bitmap or index")
