"""Split-KV decode attention over dense rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.split_kv import (
    BLOCK_M,
    NEG_INF,
    Partials,
    capped,
    lane_shares,
    mask_mode,
    mask_strides,
    row_contiguous,
    size_obstacle,
    softmax_step,
    stride_unit,
    unavailable,
    visible_rows,
)

__all__ = ["dense_attention", "obstacle", "unavailable"]


def obstacle(q, v) -> str | None:
    """Why these kernels cannot take a call that the reference can, or None."""
    return size_obstacle(q, v.shape[-1])


def dense_attention(q, k, v, *, scaling, mask=None, softcap=None):
    partials = Partials(q, k.shape[1], v.shape[3], [k.shape[2]])
    attend_dense(partials, 0, q, k, v, scaling=scaling, mask=mask, softcap=softcap)
    return partials.merged()


def attend_dense(partials, index, q, k, v, *, scaling, mask, softcap):
    """Fill part `index` of `partials` with attention over dense rows."""
    (B, _, S, D), DV = q.shape, v.shape[3]
    Hkv, N = k.shape[1:3]
    if N == 0:
        return
    out, lse, grid, rows_per_split = partials.part(index)
    k, v = row_contiguous(k, D), row_contiguous(v, DV)
    q = q if q.stride(3) == 1 else q.contiguous()
    unit = stride_unit(k, v)
    dense_attention_fwd_kernel[(*grid, B * Hkv)](
        q, k, v, q if mask is None else mask.view(torch.uint8), out, lse,
        scaling, softcap or 0.0, N, rows_per_split, S, partials.n_rows, Hkv,
        *q.stride()[:3],
        *(s // unit for s in (*k.stride()[:2], *v.stride()[:2])),
        *mask_strides(mask),
        UNIT=unit, MASK=mask_mode(mask, S), CAP=softcap is not None, **dense_config(D, q.element_size(), DV),
    )  # fmt: skip


def dense_config(D, itemsize, DV=None):
    """Compile-time constants of the kernel for keys of `D` channels and values of `DV` (None: as many)."""
    DV = D if DV is None else DV
    DP, DVP = (max(16, triton.next_power_of_2(n)) for n in (D, DV))
    row = max(DP, DVP) * itemsize
    # chosen by what does not spill (hf_kvcache.kernels.aot); padding 80 channels to 128 costs the most registers
    padded = (DP > D or DVP > DV) and row >= 256
    return {
        "D": D, "DP": DP, "DV": DV, "DVP": DVP, "BM": BLOCK_M, "NB": 4, "NR": 32 if row < 256 or padded else 16,
        "num_warps": 8 if row > 256 else 4, "num_stages": 3 if row <= 256 and not padded else 2,
        "enable_fp_fusion": True,
    }  # fmt: skip


@triton.jit(do_not_specialize=["N", "rows_per_split", "S", "n_rows", "Hkv",
                               "sq_b", "sq_h", "sq_s", "sk_b", "sk_h", "sv_b", "sv_h",
                               "sm_b", "sm_h", "sm_s", "sm_n"])  # fmt: skip
def dense_attention_fwd_kernel(
    q, k, v, mask, out, lse,
    scaling, softcap, N, rows_per_split, S, n_rows, Hkv,
    sq_b, sq_h, sq_s, sk_b, sk_h, sv_b, sv_h, sm_b, sm_h, sm_s, sm_n,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr,
    NB: tl.constexpr, NR: tl.constexpr, UNIT: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    i_m, i_split, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_h = i_bh // Hkv, i_bh % Hkv
    o_m, o_d = i_m * BM + tl.arange(0, BM), tl.arange(0, DP)
    m_m, m_d = o_m < n_rows, o_d < D
    o_v = tl.arange(0, DVP)
    m_v = o_v < DV
    o_s = o_m % S
    o_t = tl.arange(0, NB)[:, None] * NR + tl.arange(0, NR)[None, :]  # [NB, NR]

    p_q = q + i_b * sq_b + (i_h * (n_rows // S) + o_m // S) * sq_h + o_s.to(tl.int64) * sq_s
    b_q = tl.load(p_q[None, :] + o_d[:, None], mask=m_d[:, None] & m_m[None, :], other=0.0)  # [DP, BM]
    k += (i_b * sk_b + i_h * sk_h) * UNIT
    v += (i_b * sv_b + i_h * sv_h) * UNIT
    mask += i_b * sm_b + i_h * sm_h

    b_m = tl.full((NB, BM), NEG_INF, tl.float32)
    b_l = tl.zeros((NB, 8, BM), tl.float32)
    b_o = tl.zeros((NB, DVP, BM), tl.float32)
    # 64-bit row numbers: row * D passes 2**31 in long caches
    start = i_split.to(tl.int64) * rows_per_split
    stop = tl.minimum(start + rows_per_split, N)
    for i_n in tl.range(start, stop, NB * NR):
        b_left = (stop - i_n).to(tl.int32)
        m_t = o_t < b_left
        p_k = k + i_n * D + (o_t[:, :, None] * D + o_d[None, None, :])
        p_v = v + i_n * DV + (o_t[:, None, :] * DV + o_v[None, :, None])
        b_k = tl.load(p_k, mask=m_t[:, :, None] & m_d[None, None, :], other=0.0)  # [NB, NR, DP]
        b_v = tl.load(p_v, mask=m_t[:, None, :] & m_v[None, :, None], other=0.0)  # [NB, DVP, NR]
        b_s = tl.dot(b_k, tl.broadcast_to(b_q[None, :, :], (NB, DP, BM)), input_precision="ieee")  # [NB, NR, BM]
        b_s = capped(b_s * scaling, softcap, CAP)
        b_s = tl.where(visible_rows(mask, i_n, o_t, o_s, b_left, sm_s, sm_n, MASK), b_s, NEG_INF)
        b_p, b_m, b_l, b_carry = softmax_step(b_s, b_m, b_l)
        b_o = tl.dot(b_v, b_p.to(b_v.dtype), b_o * b_carry[:, None, :], input_precision="ieee")

    b_share, b_lse = lane_shares(b_m, b_l)
    o_row = (i_split * tl.num_programs(2) + i_bh) * n_rows + o_m
    b_o = tl.sum(b_o * b_share[:, None, :], 0)  # [DVP, BM]
    tl.store(out + o_row[None, :] * DV + o_v[:, None], b_o, mask=m_v[:, None] & m_m[None, :])
    tl.store(lse + o_row, b_lse, mask=m_m)
