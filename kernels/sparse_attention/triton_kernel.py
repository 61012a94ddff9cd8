"""Split-KV decode attention over sparse rows, which are expanded in registers, or faster by `gluon_kernel`."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.dense_attention.triton_kernel import attend_dense
from hf_kvcache.kernels.sparse_attention.classes import class_tiles, side_format, sparse_config
from hf_kvcache.kernels.split_kv import (
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

__all__ = ["obstacle", "sparse_attention", "unavailable"]


def obstacle(q, keys, values) -> str | None:
    """Why these kernels cannot take a call that the reference can, or None."""
    for side in (keys, values):
        if side.bits == 3:
            return "3 bits have no Triton kernel"
        if side.places is not None and side.layout == "index":
            why_not = gluon_obstacle(q, keys, values)
            return None if why_not is None else f"rows of channel numbers need Gluon, and {why_not}"
    return size_obstacle(q, values.row_width(q.shape[-1]))


def gluon_obstacle(q, keys, values) -> str | None:
    """Why a call cannot take the faster kernel of `gluon_kernel`, or None."""
    module, why_not = _gluon()
    return why_not if module is None else module.obstacle(q, keys, values)


@cache
def _gluon():
    """The Gluon kernel's module, or None and why there is none."""
    if INTERPRETED:
        return None, "Gluon has no interpreter"
    try:
        from hf_kvcache.kernels.sparse_attention import gluon_kernel
    except Exception as error:  # an experimental package: whatever this version of it lacks
        return None, f"Triton {triton.__version__} cannot load the kernel ({type(error).__name__}: {error})"
    return gluon_kernel, None


def sparse_attention(q, keys, values, tail_k=None, tail_v=None, *, scaling, mask=None, softcap=None):
    n_packed = keys.values.shape[2]
    n_tail = 0 if tail_k is None else tail_k.shape[2]
    partials = Partials(q, keys.values.shape[1], values.row_width(q.shape[-1]), [n_packed, n_tail])
    common = {"scaling": scaling, "softcap": softcap}
    packed_mask, tail_mask = (None, None) if mask is None else (mask[..., :n_packed], mask[..., n_packed:])
    attend_sparse(partials, 0, q, keys, values, mask=packed_mask, **common)
    if n_tail:
        attend_dense(partials, 1, q, tail_k, tail_v, mask=tail_mask, **common)
    return partials.merged()


def attend_sparse(partials, index, q, keys, values, *, scaling, mask, softcap):
    """Fill part `index` of `partials` with attention over sparse rows."""
    if keys.values.shape[2] == 0:
        return
    attend = attend_triton if gluon_obstacle(q, keys, values) else _gluon()[0].attend
    attend(partials, index, q, keys, values, scaling=scaling, mask=mask, softcap=softcap)


def attend_triton(partials, index, q, keys, values, *, scaling, mask, softcap):
    (B, _, S, D), DV = q.shape, partials.out.shape[-1]
    Hkv, N = keys.values.shape[1:3]
    out, lse, grid, rows_per_split = partials.part(index)
    q = q if q.stride(3) == 1 else q.contiguous()
    k_tensors, v_tensors = side_tensors(keys), side_tensors(values)
    unit = stride_unit(*k_tensors[:2], *v_tensors[:2])
    sparse_attention_fwd_kernel[(*grid, B * Hkv)](
        q, *k_tensors, *v_tensors, q if mask is None else mask.view(torch.uint8), out, lse,
        scaling, softcap or 0.0, N, rows_per_split, S, partials.n_rows, Hkv,
        *q.stride()[:3], *side_strides(k_tensors, unit), *side_strides(v_tensors, unit), *mask_strides(mask),
        **sparse_config(D, side_format(keys, D), side_format(values, DV), DV),
        UNIT=unit, MASK=mask_mode(mask, S), CAP=softcap is not None,
    )  # fmt: skip


def side_tensors(side):
    """Values, places, scale and zero with adjacent rows; the values stand in for what a side does not have."""
    values, places, scale, zero = (
        None if x is None else row_contiguous(x, x.shape[3]) for x in (side.values, side.places, side.scale, side.zero)
    )
    if scale is not None and scale.stride() != zero.stride():
        scale, zero = scale.contiguous(), zero.contiguous()
    return tuple(values if x is None else x for x in (values, places, scale, zero))


def side_strides(tensors, unit):
    """Batch and head strides of values and places in units, and of the scale in elements."""
    values, places, scale, _ = tensors
    return *(s // unit for x in (values, places) for s in x.stride()[:2]), *scale.stride()[:2]


@triton.jit(do_not_specialize=["N", "rows_per_split", "S", "n_rows", "Hkv", "sq_b", "sq_h", "sq_s",
                               "sk_b", "sk_h", "skp_b", "skp_h", "sks_b", "sks_h",
                               "sv_b", "sv_h", "svp_b", "svp_h", "svs_b", "svs_h",
                               "sm_b", "sm_h", "sm_s", "sm_n"])  # fmt: skip
def sparse_attention_fwd_kernel(
    q, k_values, k_places, k_scale, k_zero, v_values, v_places, v_scale, v_zero, mask, out, lse,
    scaling, softcap, N, rows_per_split, S, n_rows, Hkv,
    sq_b, sq_h, sq_s, sk_b, sk_h, skp_b, skp_h, sks_b, sks_h, sv_b, sv_h, svp_b, svp_h, svs_b, svs_h,
    sm_b, sm_h, sm_s, sm_n,
    D: tl.constexpr, DV: tl.constexpr,
    K_FORM: tl.constexpr, K_KEEP: tl.constexpr, K_BITS: tl.constexpr, K_GROUPS: tl.constexpr,
    K_W: tl.constexpr, K_C: tl.constexpr,
    V_FORM: tl.constexpr, V_KEEP: tl.constexpr, V_BITS: tl.constexpr, V_GROUPS: tl.constexpr,
    V_W: tl.constexpr, V_C: tl.constexpr,
    BM: tl.constexpr, NB: tl.constexpr, NR: tl.constexpr, UNIT: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = q.dtype.element_ty
    K_ROW: tl.constexpr = K_KEEP if K_BITS == 0 else K_KEEP * K_BITS // 16
    V_ROW: tl.constexpr = V_KEEP if V_BITS == 0 else V_KEEP * V_BITS // 16
    K_BYTES: tl.constexpr = (D + 7) // 8
    V_BYTES: tl.constexpr = (DV + 7) // 8
    i_m, i_split, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_h = i_bh // Hkv, i_bh % Hkv
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < n_rows
    o_s = o_m % S
    o_t = tl.arange(0, NB)[:, None] * NR + tl.arange(0, NR)[None, :]  # [NB, NR]
    o_kc, o_vc = tl.arange(0, K_C), tl.arange(0, V_C)

    k_values += (i_b * sk_b + i_h * sk_h) * UNIT
    k_places += (i_b * skp_b + i_h * skp_h) * UNIT
    k_scale += i_b * sks_b + i_h * sks_h
    k_zero += i_b * sks_b + i_h * sks_h
    v_values += (i_b * sv_b + i_h * sv_h) * UNIT
    v_places += (i_b * svp_b + i_h * svp_h) * UNIT
    v_scale += i_b * svs_b + i_h * svs_h
    v_zero += i_b * svs_b + i_h * svs_h
    mask += i_b * sm_b + i_h * sm_h

    # one tile [K_C, BM] of the query and one [NB, V_C, BM] of the output per class
    p_q = q + i_b * sq_b + (i_h * (n_rows // S) + o_m // S) * sq_h + o_s.to(tl.int64) * sq_s
    b_q, b_o = (), ()
    for j in tl.static_range(K_W):
        m_q = (o_kc * K_W + j < D)[:, None] & m_m[None, :]
        b_q = b_q + (tl.load(p_q[None, :] + (o_kc * K_W + j)[:, None], mask=m_q, other=0.0),)
    for _ in tl.static_range(V_W):
        b_o = b_o + (tl.zeros((NB, V_C, BM), tl.float32),)
    b_m = tl.full((NB, BM), NEG_INF, tl.float32)
    b_l = tl.zeros((NB, 8, BM), tl.float32)

    # 64-bit row numbers: row * D passes 2**31 in long caches
    start = i_split.to(tl.int64) * rows_per_split
    stop = tl.minimum(start + rows_per_split, N)
    for i_n in tl.range(start, stop, NB * NR):
        b_left = (stop - i_n).to(tl.int32)
        m_t = o_t < b_left
        b_k = class_tiles(
            k_values + i_n * K_ROW, k_places + i_n * K_BYTES, k_scale + i_n * K_GROUPS, k_zero + i_n * K_GROUPS,
            o_t[:, :, None], o_kc[None, None, :], m_t[:, :, None],
            D, K_FORM, K_KEEP, K_BITS, K_GROUPS, K_W, 2, DTYPE,
        )  # [NB, NR, K_C]  # fmt: skip
        b_s = tl.zeros((NB, NR, BM), tl.float32)
        for j in tl.static_range(K_W):
            b_x = tl.broadcast_to(b_q[j][None, :, :], (NB, K_C, BM))
            b_s = tl.dot(b_k[j], b_x, b_s, input_precision="ieee")
        b_s = capped(b_s * scaling, softcap, CAP)
        b_s = tl.where(visible_rows(mask, i_n, o_t, o_s, b_left, sm_s, sm_n, MASK), b_s, NEG_INF)
        b_p, b_m, b_l, b_carry = softmax_step(b_s, b_m, b_l)
        b_p = b_p.to(DTYPE)
        b_v = class_tiles(
            v_values + i_n * V_ROW, v_places + i_n * V_BYTES, v_scale + i_n * V_GROUPS, v_zero + i_n * V_GROUPS,
            o_t[:, None, :], o_vc[None, :, None], m_t[:, None, :],
            DV, V_FORM, V_KEEP, V_BITS, V_GROUPS, V_W, 1, DTYPE,
        )  # [NB, V_C, NR]  # fmt: skip
        b_o_new = ()
        for j in tl.static_range(V_W):
            b_o_new = b_o_new + (tl.dot(b_v[j], b_p, b_o[j] * b_carry[:, None, :], input_precision="ieee"),)
        b_o = b_o_new

    b_share, b_lse = lane_shares(b_m, b_l)
    o_row = (i_split * tl.num_programs(2) + i_bh) * n_rows + o_m
    for j in tl.static_range(V_W):
        b_x = tl.sum(b_o[j] * b_share[:, None, :], 0)  # [V_C, BM]
        m_o = (o_vc * V_W + j < DV)[:, None] & m_m[None, :]
        tl.store(out + o_row[None, :] * DV + (o_vc * V_W + j)[:, None], b_x, mask=m_o)
    tl.store(lse + o_row, b_lse, mask=m_m)
