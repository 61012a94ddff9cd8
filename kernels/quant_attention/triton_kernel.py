"""Split-KV decode attention over packed rows; tiles, softmax and geometry are those of `split_kv`.

Scales go to the query (keys) and to the weights (values); the algebra is in README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.dense_attention.triton_kernel import attend_dense
from hf_kvcache.kernels.quant_attention.fields import ULP, add_codes, field_tiles, query_fields, scores_by_token
from hf_kvcache.kernels.quant_attention.reference import rows_in_use
from hf_kvcache.kernels.split_kv import (
    BLOCK_M,
    INTERPRETED,
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

__all__ = ["obstacle", "quant_attention", "unavailable"]


def obstacle(q, keys, values, bits, key_axis) -> str | None:
    """Why these kernels cannot take a call that the reference can, or None."""
    sizes = q.shape[-1], values[0].shape[-1] * 16 // bits[1]
    if 3 in bits:
        return "3 bits have no Triton kernel"
    for D in sizes:
        if D % 16:
            return f"head size {D} is not a multiple of 16"
    grouped = [(sizes[1], values[1], bits[1])] + ([(sizes[0], keys[1], bits[0])] if key_axis == "token" else [])
    for D, scale, width in grouped:
        if D // scale.shape[3] % (D * width // 16):
            return f"groups of {D // scale.shape[3]} channels do not hold whole fields of {D * width // 16}"
    return size_obstacle(q, sizes[1])


def quant_attention(
    q, keys, values, tail_k=None, tail_v=None, *, bits, key_axis, scaling, mask=None, softcap=None, n_packed=None
):
    keys, values = rows_in_use(keys, n_packed), rows_in_use(values, n_packed)
    n_packed = keys[0].shape[2]
    n_tail = 0 if tail_k is None else tail_k.shape[2]
    partials = Partials(q, keys[0].shape[1], values[0].shape[3] * 16 // bits[1], [n_packed, n_tail])
    common = {"scaling": scaling, "softcap": softcap}
    packed_mask, tail_mask = (None, None) if mask is None else (mask[..., :n_packed], mask[..., n_packed:])
    attend_packed(partials, 0, q, keys, values, bits=bits, key_axis=key_axis, mask=packed_mask, **common)
    if n_tail:
        attend_dense(partials, 1, q, tail_k, tail_v, mask=tail_mask, **common)
    return partials.merged()


def attend_packed(partials, index, q, keys, values, *, bits, key_axis, scaling, mask, softcap):
    """Fill part `index` of `partials` with attention over packed rows."""
    (B, _, S, D), DV = q.shape, partials.out.shape[-1]
    Hkv, N = keys[0].shape[1:3]
    if N == 0:
        return
    out, lse, grid, rows_per_split = partials.part(index)
    keys, values = ([row_contiguous(x, x.shape[3]) for x in side] for side in (keys, values))
    keys, values = same_strides(*keys), same_strides(*values)
    q = q if q.stride(3) == 1 else q.contiguous()
    unit = stride_unit(*keys, *values)
    strides = [s // unit for x in (*keys[:2], *values[:2]) for s in x.stride()[:2]]
    config = quant_config(D, bits, key_axis, keys[1].shape[3], values[1].shape[3], DV)
    n_blocks, n_splits = grid
    quant_attention_fwd_kernel[(n_blocks * config["V_TILES"], n_splits, B * Hkv)](
        q, *keys, *values, q if mask is None else mask.view(torch.uint8), out, lse,
        scaling, softcap or 0.0, N, rows_per_split, S, partials.n_rows, Hkv,
        *q.stride()[:3], *strides, *mask_strides(mask),
        **config, UNIT=unit, MASK=mask_mode(mask, S), CAP=softcap is not None,
        EXACT=q.dtype == torch.float32, ASM=not INTERPRETED,
    )  # fmt: skip


def same_strides(codes, scale, zero):
    """The triple with scale and zero laid out alike (stores keep them so)."""
    if scale.stride() != zero.stride():
        scale, zero = scale.contiguous(), zero.contiguous()
    return codes, scale, zero


def quant_config(D, bits, key_axis, k_groups, v_groups, DV=None):
    """Compile-time constants of the kernel for one format, keys of `D` channels and values of `DV` (None: as many)."""
    DV = D if DV is None else DV
    k_words, v_words, widest = D * bits[0] // 16, DV * bits[1] // 16, max(D, DV)
    # chosen by what does not spill (hf_kvcache.kernels.aot): half the rows or value channels, or two warps to a lane
    if widest > 128 and (bits != (4, 4) or key_axis == "token" or D != DV):
        rows, num_warps, v_tiles = 16, 4, 2
    elif widest > 128:
        rows, num_warps, v_tiles = 32, 8, 1
    elif widest * max(bits) > 512:
        rows, num_warps, v_tiles = 16, 4, 1
    else:
        rows, num_warps, v_tiles = 32, 4, 1
    return {
        "D": D, "DV": DV, "K_BITS": bits[0], "V_BITS": bits[1],
        "KW": k_words, "KWP": max(16, triton.next_power_of_2(k_words)),
        "VW": v_words, "VWP": max(16, triton.next_power_of_2(v_words) // v_tiles), "V_TILES": v_tiles,
        "K_GROUPS": 0 if key_axis == "channel" else k_groups, "V_GROUPS": v_groups,
        "BM": BLOCK_M, "NB": 4, "NR": rows, "num_warps": num_warps,
        "num_stages": 3 if widest <= 128 or 8 in bits else 2, "enable_fp_fusion": True,
    }  # fmt: skip


@triton.jit
def split_fields(b_x, F: tl.constexpr):
    """`[NB, WP / 2, F]` int32 to `F` tiles `[NB, WP]` of the float16 pairs in them."""
    if F == 1:
        b_pair = tl.reshape(b_x, (b_x.shape[0], b_x.shape[1]))
        b_low = (b_pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        b_high = (b_pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return (tl.reshape(tl.join(b_low, b_high), (b_x.shape[0], 2 * b_x.shape[1])),)
    else:
        b_x = tl.reshape(b_x, (b_x.shape[0], b_x.shape[1], 2, F // 2))
        b_first, b_second = tl.split(tl.permute(b_x, (0, 1, 3, 2)))
        return split_fields(b_first, F // 2) + split_fields(b_second, F // 2)


@triton.jit(do_not_specialize=["N", "rows_per_split", "S", "n_rows", "Hkv", "sq_b", "sq_h", "sq_s",
                               "sk_b", "sk_h", "sks_b", "sks_h", "sv_b", "sv_h", "svs_b", "svs_h",
                               "sm_b", "sm_h", "sm_s", "sm_n"])  # fmt: skip
def quant_attention_fwd_kernel(
    q, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, mask, out, lse,
    scaling, softcap, N, rows_per_split, S, n_rows, Hkv,
    sq_b, sq_h, sq_s, sk_b, sk_h, sks_b, sks_h, sv_b, sv_h, svs_b, svs_h, sm_b, sm_h, sm_s, sm_n,
    D: tl.constexpr, DV: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    KW: tl.constexpr, KWP: tl.constexpr, VW: tl.constexpr, VWP: tl.constexpr, V_TILES: tl.constexpr,
    K_GROUPS: tl.constexpr, V_GROUPS: tl.constexpr,
    BM: tl.constexpr, NB: tl.constexpr, NR: tl.constexpr, UNIT: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr,
    EXACT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    V_FIELDS: tl.constexpr = 16 // V_BITS
    K_CENTRE: tl.constexpr = (2**K_BITS - 1) / 2
    DTYPE: tl.constexpr = tl.float32 if EXACT else tl.float16

    i_m, i_v = tl.program_id(0) // V_TILES, tl.program_id(0) % V_TILES
    i_split, i_bh = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_h = i_bh // Hkv, i_bh % Hkv
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < n_rows
    o_s = o_m % S
    o_b = tl.arange(0, NB)
    o_t = o_b[:, None] * NR + tl.arange(0, NR)[None, :]  # [NB, NR]
    o_kw, o_vw = tl.arange(0, KWP), i_v * VWP + tl.arange(0, VWP)
    m_kw, m_vw = o_kw < KW, o_vw < VW

    k_codes += (i_b * sk_b + i_h * sk_h) * UNIT
    v_codes += (i_b * sv_b + i_h * sv_h) * UNIT
    k_scale += (i_b * sks_b + i_h * sks_h) * UNIT
    k_zero += (i_b * sks_b + i_h * sks_h) * UNIT
    v_scale += (i_b * svs_b + i_h * svs_h) * UNIT
    v_zero += (i_b * svs_b + i_h * svs_h) * UNIT
    mask += i_b * sm_b + i_h * sm_h

    p_q = q + i_b * sq_b + (i_h * (n_rows // S) + o_m // S) * sq_h + o_s.to(tl.int64) * sq_s
    b_q, b_q_sum, b_unit = query_fields(p_q, o_kw, m_m, KW, K_BITS, K_GROUPS, DTYPE)
    b_scaling = scaling * b_unit  # [BM]

    b_m = tl.full((NB, BM), NEG_INF, tl.float32)
    b_l = tl.zeros((NB, 8, BM), tl.float32)
    b_o, b_shift = (), ()
    for _ in tl.static_range(V_FIELDS):
        b_o = b_o + (tl.zeros((NB, VWP, BM), tl.float32),)
    for _ in tl.static_range(V_GROUPS):
        b_shift = b_shift + (tl.zeros((NB, 8, BM), tl.float32),)

    # 64-bit row numbers: row * D passes 2**31 in long caches
    start = i_split.to(tl.int64) * rows_per_split
    stop = tl.minimum(start + rows_per_split, N)
    for i_n in tl.range(start, stop, NB * NR):
        b_left = (stop - i_n).to(tl.int32)
        m_t = o_t < b_left
        p_k = k_codes + i_n * KW + (o_t[:, :, None] * KW + o_kw[None, None, :])
        p_v = v_codes + i_n * VW + (o_t[:, None, :] * VW + o_vw[None, :, None])
        b_k_words = tl.load(p_k, mask=m_t[:, :, None] & m_kw[None, None, :], other=0)  # [NB, NR, KWP]
        b_v_words = tl.load(p_v, mask=m_t[:, None, :] & m_vw[None, :, None], other=0)  # [NB, VWP, NR]

        b_k = field_tiles(b_k_words, K_BITS, EXACT, ASM)
        if K_GROUPS == 0:
            b_s = scores_by_channel(
                b_q, b_k, k_scale, k_zero, i_n // 32 * (D // 2), o_b, b_left,
                D, K_BITS, K_CENTRE, KW, KWP, BM, NB, NR, DTYPE,
            )  # fmt: skip
        else:
            b_s = scores_by_token(
                b_q, b_q_sum, b_k, k_scale + i_n * K_GROUPS, k_zero + i_n * K_GROUPS, o_t, m_t,
                K_BITS, K_CENTRE, K_GROUPS, KWP, BM, NB, NR,
            )  # fmt: skip
        b_s = capped(b_s * b_scaling[None, None, :], softcap, CAP)
        b_s = tl.where(visible_rows(mask, i_n, o_t, o_s, b_left, sm_s, sm_n, MASK), b_s, NEG_INF)
        b_p, b_m, b_l, b_carry = softmax_step(b_s, b_m, b_l)

        p_scale, p_zero = v_scale + i_n * V_GROUPS, v_zero + i_n * V_GROUPS
        b_o, b_shift = add_codes(
            b_o, b_shift, b_p, b_carry, b_v_words, p_scale, p_zero, o_t, m_t, V_BITS, V_GROUPS, EXACT, ASM
        )

    b_share, b_lse = lane_shares(b_m, b_l)
    o_row = (i_split * tl.num_programs(2) + i_bh) * n_rows + o_m
    for f in tl.static_range(V_FIELDS):
        b_x = b_o[f] * (2.0 ** (24 - f * V_BITS % 8)) + tl.sum(b_shift[f * V_GROUPS // V_FIELDS], 1)[:, None, :]
        b_x = tl.sum(b_x * b_share[:, None, :], 0)  # [VWP, BM]
        tl.store(out + o_row[None, :] * DV + (f * VW + o_vw)[:, None], b_x, mask=m_vw[:, None] & m_m[None, :])
    if i_v == 0:
        tl.store(lse + o_row, b_lse, mask=m_m)


@triton.jit
def scores_by_channel(
    b_q, b_k, k_scale, k_zero, i_pair, o_b, b_left,
    D: tl.constexpr, BITS: tl.constexpr, CENTRE: tl.constexpr, KW: tl.constexpr, KWP: tl.constexpr,
    BM: tl.constexpr, NB: tl.constexpr, NR: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Scores `[NB, NR, BM]` where each block of 32 rows has a scale per channel: the scale goes into the query."""
    F: tl.constexpr = 16 // BITS
    # scales are read as pairs, [NB, KWP / 2, F] int32: half the loads, and they pass through shared memory by cp.async
    o_h, o_f = tl.arange(0, KWP // 2), tl.arange(0, F)
    m_pair = (o_b * NR < b_left)[:, None, None] & (o_h < KW // 2)[None, :, None]
    o_pair = (o_b * NR // 32)[:, None, None] * (D // 2) + o_h[None, :, None] + (o_f * (KW // 2))[None, None, :]
    m_pair = m_pair & (o_f < F)[None, None, :]
    p_scale = k_scale.to(tl.pointer_type(tl.int32)) + i_pair + o_pair
    p_zero = k_zero.to(tl.pointer_type(tl.int32)) + i_pair + o_pair
    b_scale = split_fields(tl.load(p_scale, mask=m_pair, other=0), F)
    b_zero = split_fields(tl.load(p_zero, mask=m_pair, other=0), F)

    b_s = tl.zeros((NB, NR, BM), tl.float32)
    # 16 equal rows each: a product with the tensor core costs less than a sum over channels
    b_q_zero = tl.zeros((NB, 16, BM), tl.float32)
    b_q_scale = tl.zeros((NB, 16, BM), tl.float32)
    for f in tl.static_range(F):
        b_x = tl.broadcast_to(b_q[f][None, :, :], (NB, KWP, BM))
        b_rows = tl.broadcast_to(b_zero[f].to(DTYPE)[:, None, :], (NB, 16, KWP))
        b_q_zero = tl.dot(b_rows, b_x, b_q_zero, input_precision="ieee")
        b_rows = tl.broadcast_to(b_scale[f].to(DTYPE)[:, None, :], (NB, 16, KWP))
        b_q_scale = tl.dot(b_rows, b_x, b_q_scale, input_precision="ieee")
        b_folded = b_x * (b_scale[f] * (2.0 ** -(f * BITS % 8))).to(DTYPE)[:, :, None]
        b_s = tl.dot(b_k[f], b_folded, b_s, input_precision="ieee")
    return b_s / ULP + tl.max(b_q_zero - CENTRE * b_q_scale, 1)[:, None, :]
