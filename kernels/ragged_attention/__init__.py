"""Attention of a few queries over pages of rows, every head with a length of its own, and a dense tail."""

from __future__ import annotations

import torch

from hf_kvcache.kernels import check_operands, select
from hf_kvcache.kernels.sparse_attention.rows import SparseRows

__all__ = ["ragged_attention"]


def ragged_attention(
    q: torch.Tensor,
    keys: SparseRows,
    values: SparseRows,
    table: torch.Tensor,
    lengths: torch.Tensor,
    tail_k: torch.Tensor | None = None,
    tail_v: torch.Tensor | None = None,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over rows in pages, of which every head of every batch row may keep as many as it likes, and a dense tail.

    A page belongs to one head; heads find theirs in a block table (PagedAttention, arXiv 2309.06180, per head). Rows
    are of any row-granular format: dense, quantised per token, sparse, or sparse and quantised.

    Args:
        q: queries `[B, Hq, S, D]`, float16, bfloat16, float32 or float64. All of them see all rows in pages.
        keys: rows in pages, `SparseRows` whose tensors are `[P, 1, page, ...]` instead of `[B, Hkv, N, ...]`.
        values: likewise, with the same `P` and `page`; `Dv` channels, which may be other than `D`.
        table: pages of every head in the order of its rows, int32 `[B, Hkv, M]`. The first `ceil(length / page)`
            entries of a head are read; what stands behind them does not matter.
        lengths: rows of every head, int32 `[B, Hkv]`, zero included.
        tail_k: dense keys `[B, Hkv, M, D]` behind those of all heads, in the dtype of `q`, or None.
        tail_v: dense values `[B, Hkv, M, Dv]`, likewise.
        scaling: factor on the scores.
        mask: of the tail, boolean `[B | 1, Hkv | 1, S, M]`, True where a query may look; None for everything.
        softcap: scores become `softcap * tanh(scores / softcap)`.

    Returns:
        The output `[B, Hq, S, Dv]` in the dtype of `q` and the natural log-sum-exp of the scores, scaled and capped,
        `[B, Hq, S]` in float32 (float64 for float64 queries). A query that sees nothing gets zeros and `-inf`.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    check_pages(q, keys, values, table, lengths)
    if tail_k is not None:
        check_operands(q, tail_k, tail_v, mask)
        if tail_k.shape[1] != lengths.shape[1] or tail_v.shape[3] != values.row_width(q.shape[3]):
            raise ValueError(f"a tail of {list(tail_k.shape)} and {list(tail_v.shape)} does not go with the pages")
    elif mask is not None:
        raise ValueError("a mask is of the tail, and there is none")
    run = select("ragged_attention", q.device, (q, keys, values))
    return run(q, keys, values, table, lengths, tail_k, tail_v, scaling=scaling, mask=mask, softcap=softcap)


def check_pages(q, keys, values, table, lengths):
    if q.dim() != 4 or lengths.dim() != 2 or q.shape[0] != lengths.shape[0] or q.shape[1] % lengths.shape[1]:
        raise ValueError(f"q {list(q.shape)} and lengths {list(lengths.shape)} must be [B, Hq, S, D] and [B, Hkv]")
    if table.dim() != 3 or table.shape[:2] != lengths.shape or {table.dtype, lengths.dtype} != {torch.int32}:
        raise ValueError(f"table {table.dtype} {list(table.shape)} must be int32 [B, Hkv, M], lengths int32 [B, Hkv]")
    pages = keys.values.shape[:3]
    if pages != values.values.shape[:3] or pages[1] != 1:
        raise ValueError(
            f"keys {list(keys.values.shape)} and values {list(values.values.shape)} must both be [P, 1, page, ...]"
        )
    for name, rows in (("keys", keys), ("values", values)):
        keep = rows.keep
        D = keep if rows.places is None else rows.row_width(q.shape[-1])
        if keep > D or (name == "keys" and D != q.shape[-1]):
            raise ValueError(f"{name}: rows of {keep} channels do not fit a head size of {q.shape[-1]}")
        if rows.places is not None and rows.layout != "index" and rows.places.shape[-1] != -(-D // 8):
            raise ValueError(f"{name}: bitmaps of {rows.places.shape[-1]} bytes do not fit a head size of {D}")
        if rows.bits is None and rows.values.dtype != q.dtype:
            raise ValueError(f"{name} are {rows.values.dtype}, queries {q.dtype}")
        if rows.bits is not None and (rows.values.dtype != torch.int16 or rows.scale is None or rows.zero is None):
            raise ValueError(f"{name}: {rows.bits}-bit values are int16 codes with scale and zero")
