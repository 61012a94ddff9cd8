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
        like: the queries `[B, Hq, S, D]`.

    Returns:
        Output shaped and typed like the queries, and log-sum-exp `[B, Hq, S]` in float32.
    """
    B, Hq, S, D = like.shape
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
    o_d, o_p = tl.arange(0, DP), tl.arange(0, BP)
    b_top = tl.full((), NEG_INF, tl.float32)
    for i_p in tl.range(0, n_partials, BP):
        m_p = i_p + o_p < n_partials
        p_lse = partial_lse + (i_p + o_p).to(tl.int64) * n_rows + i_row
        b_top = tl.maximum(b_top, tl.max(tl.load(p_lse, mask=m_p, other=NEG_INF), 0))
    b_base = tl.where(b_top == NEG_INF, 0.0, b_top)
    b_o = tl.zeros((DP,), tl.float32)
    b_total = tl.full((), 0.0, tl.float32)
    for i_p in tl.range(0, n_partials, BP):
        m_p = i_p + o_p < n_partials
        o_row = (i_p + o_p).to(tl.int64) * n_rows + i_row
        b_share = tl.exp(tl.load(partial_lse + o_row, mask=m_p, other=NEG_INF) - b_base)
        m_tile = m_p[:, None] & (o_d < D)[None, :]
        b_part = tl.load(partial_out + o_row[:, None] * D + o_d[None, :], mask=m_tile, other=0.0)
        b_o += tl.sum(b_part * b_share[:, None], 0)
        b_total += tl.sum(b_share, 0)
    b_seen = tl.where(b_total > 0, b_total, 1.0)
    tl.store(out + i_row * D + o_d, b_o / b_seen, mask=o_d < D)
    tl.store(lse + i_row, tl.where(b_total > 0, b_base + tl.log(b_seen), NEG_INF))
