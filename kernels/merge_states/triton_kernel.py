"""Merge the partial results of split attention by their log-sum-exp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))


def merge_partials(partial_out, partial_lse, like):
    """Combine splits written by the attention kernels.

    Args:
        partial_out: normalised outputs `[P, B * Hq * S, D]`, float32.
        partial_lse: their natural log-sum-exp `[P, B * Hq * S]`, float32.
        like: the queries, `[B, Hq, S, ...]`.

    Returns:
        Output `[B, Hq, S, D]` in the dtype of the queries, and log-sum-exp `[B, Hq, S]` in float32.
    """
    (B, Hq, S, _), D = like.shape, partial_out.shape[-1]
    out = torch.empty(B, Hq, S, D, dtype=like.dtype, device=like.device)
    lse = torch.empty(B, Hq, S, dtype=torch.float32, device=like.device)
    n_partials, n_rows = partial_lse.shape
    if n_rows:
        merge_states_fwd_kernel[(n_rows,)](
            partial_out, partial_lse, out, lse, n_partials, n_rows,
            D=D, DP=triton.next_power_of_2(D), BP=16, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["n_partials", "n_rows"])
def merge_states_fwd_kernel(
    partial_out, partial_lse, out, lse, n_partials, n_rows, D: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    b_o, b_lse = merged_row(partial_out, partial_lse, partial_lse, n_partials, n_rows, i_row, D, DP, BP, False)
    o_d = tl.arange(0, DP)
    tl.store(out + i_row * D + o_d, b_o, mask=o_d < D)
    tl.store(lse + i_row, b_lse)


def merge_ragged_partials(partial_out, partial_lse, lengths, rows_per_tile, like, order=None):
    """Combine the partial results of every head, of which it has one per `rows_per_tile` of its rows.

    Args:
        partial_out: normalised outputs `[P, G * S, D]`: those of the first head, then those of the second, and so on.
        partial_lse: their natural log-sum-exp `[P, G * S]`, float32.
        lengths: rows of every head, int32 `[B, Hkv]`.
        rows_per_tile: rows behind one partial result, fewer behind the last of a head.
        like: the queries, `[B, Hq, S, ...]`.
        order: int32 `[B, Hkv, M]`, where the partial results of every head are if not as said above.

    Returns:
        Output `[B, Hq, S, D]` in the dtype of the queries, and log-sum-exp `[B, Hq, S]` in float32.
    """
    (B, Hq, S, _), D = like.shape, partial_out.shape[-1]
    n_heads, n_rows = lengths.numel(), partial_lse.shape[1]
    lengths = lengths.contiguous()
    places = lengths if order is None else order.contiguous()
    out = torch.empty(B, Hq, S, D, dtype=like.dtype, device=like.device)
    lse = torch.empty(B, Hq, S, dtype=torch.float32, device=like.device)
    if n_heads * n_rows:
        merge_ragged_states_fwd_kernel[(n_heads * n_rows,)](
            partial_out, partial_lse, places, lengths, out, lse,
            rows_per_tile, n_rows, places.shape[-1],
            D=D, DP=triton.next_power_of_2(D), BP=16, ORDERED=order is not None, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["rows_per_tile", "n_rows", "M"])
def merge_ragged_states_fwd_kernel(
    partial_out, partial_lse, order, lengths, out, lse, rows_per_tile, n_rows, M,
    D: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    i_head, i_row = tl.program_id(0) // n_rows, (tl.program_id(0) % n_rows).to(tl.int64)
    n_tiles = tl.cdiv(tl.load(lengths + i_head), rows_per_tile)
    if ORDERED:
        order += i_head.to(tl.int64) * M
    else:
        o_head = tl.arange(0, 128)
        i_first = 0
        for i in tl.range(0, i_head, 128):
            b_length = tl.load(lengths + i + o_head, mask=i + o_head < i_head, other=0)
            i_first += tl.sum(tl.cdiv(b_length, rows_per_tile), 0)
        partial_out += i_first.to(tl.int64) * n_rows * D
        partial_lse += i_first.to(tl.int64) * n_rows
    b_o, b_lse = merged_row(partial_out, partial_lse, order, n_tiles, n_rows, i_row, D, DP, BP, ORDERED)
    o_d, o_out = tl.arange(0, DP), tl.program_id(0).to(tl.int64)
    tl.store(out + o_out * D + o_d, b_o, mask=o_d < D)
    tl.store(lse + o_out, b_lse)


@triton.jit
def merged_row(
    partial_out, partial_lse, order, n_partials, n_rows, i_row,
    D: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Row `i_row` of `n_partials` partial results, the first or those in `order`, merged: output and log-sum-exp."""
    o_d, o_p = tl.arange(0, DP), tl.arange(0, BP)
    b_top = tl.full((), NEG_INF, tl.float32)
    for i_p in tl.range(0, n_partials, BP):
        m_p = i_p + o_p < n_partials
        o_row = partial_number(order, i_p + o_p, m_p, ORDERED) * n_rows + i_row
        b_top = tl.maximum(b_top, tl.max(tl.load(partial_lse + o_row, mask=m_p, other=NEG_INF), 0))
    b_base = tl.where(b_top == NEG_INF, 0.0, b_top)
    b_o = tl.zeros((DP,), tl.float32)
    b_total = tl.full((), 0.0, tl.float32)
    for i_p in tl.range(0, n_partials, BP):
        m_p = i_p + o_p < n_partials
        o_row = partial_number(order, i_p + o_p, m_p, ORDERED) * n_rows + i_row
        b_share = tl.exp(tl.load(partial_lse + o_row, mask=m_p, other=NEG_INF) - b_base)
        m_tile = m_p[:, None] & (o_d < D)[None, :]
        b_part = tl.load(partial_out + o_row[:, None] * D + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32)
        b_o += tl.sum(b_part * b_share[:, None], 0)
        b_total += tl.sum(b_share, 0)
    b_seen = tl.where(b_total > 0, b_total, 1.0)
    return b_o / b_seen, tl.where(b_total > 0, b_base + tl.log(b_seen), NEG_INF)


@triton.jit
def partial_number(order, o_p, m_p, ORDERED: tl.constexpr):
    if ORDERED:
        return tl.load(order + o_p, mask=m_p, other=0).to(tl.int64)
    else:
        return o_p.to(tl.int64)
