"""The kernels of `lowrank_attention`: scores by keys rebuilt from latents or by latents, and sums of value latents."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_kvcache.kernels.lowrank_attention.tiles import (
    expanded,
    held,
    in_order,
    latent_tiles,
    mean_tile,
    rotations_in_order,
    table_row,
    turned,
    turned_back,
    up_halves,
    up_tiles,
)
from hf_kvcache.kernels.split_kv import LOG2E, NEG_INF, capped, lane_shares, softmax_step, visible_rows


@triton.jit
def query_tile(p_q, m_m, o_d, m_d):
    """Channels `o_d` of the queries, `[C, BM]`."""
    return tl.load(p_q[None, :] + o_d[:, None], mask=m_d[:, None] & m_m[None, :], other=0.0)


@triton.jit
def query_halves(p_q, m_m, o_h, HALF: tl.constexpr, HC: tl.constexpr, HF: tl.constexpr):
    """First and second channels of the rotary pairs, in `HF` tiles `[HC, BM]` each."""
    b_q1, b_q2 = (), ()
    for c in tl.static_range(HF):
        b_q1 = b_q1 + (query_tile(p_q, m_m, c * HC + o_h, c * HC + o_h < HALF),)
        b_q2 = b_q2 + (query_tile(p_q, m_m, HALF + c * HC + o_h, c * HC + o_h < HALF),)
    return b_q1, b_q2


@triton.jit
def scores(b_k, b_q, b_s, DTYPE: tl.constexpr):
    """Add keys `[TILE, C]` times queries `[C, BM]` to scores `[NB, NR, BM]`, a lane of keys per warp."""
    b_k = tl.reshape(b_k.to(DTYPE), (b_s.shape[0], b_s.shape[1], b_k.shape[1]))
    b_q = tl.broadcast_to(b_q.to(DTYPE)[None, :, :], (b_s.shape[0], b_q.shape[0], b_q.shape[1]))
    return tl.dot(b_k, b_q, b_s, input_precision="ieee")


@triton.jit
def store_weights(b_s, weights, tops, i_n, o_t, o_row, m_m, n_tiles, n_all):
    """Write `2**(scores - top)` of a whole tile, also beyond the last row, and its `top` per query row."""
    TILE: tl.constexpr = b_s.shape[0] * b_s.shape[1]
    b_top = tl.max(tl.max(b_s, 1), 0)  # [BM]
    b_p = tl.exp2(b_s - tl.where(b_top == NEG_INF, 0.0, b_top)[None, None, :])
    p_weights = weights + (o_row * n_tiles)[None, None, :] * TILE + i_n + o_t[:, :, None]
    tl.store(p_weights, b_p.to(weights.dtype.element_ty), mask=m_m[None, None, :] & (o_t >= 0)[:, :, None])
    tl.store(tops + i_n // TILE * n_all + o_row, b_top, mask=m_m)


@triton.jit
def attend_in_any_order(
    p_q, k_rows, k_scale, k_zero, up, mean, positions, coarse, fine, mask, out, lse,
    scaling, softcap, start, stop, n_pieces, n_coarse, n_tiles, n_all, su_r, sm_s, sm_n,
    o_t, o_n, o_s, o_kw, o_h, o_r, o_row, m_m,
    D: tl.constexpr, HALF: tl.constexpr, HC: tl.constexpr, RP: tl.constexpr, RF: tl.constexpr,
    K_RANK: tl.constexpr, K_BITS: tl.constexpr, K_GROUPS: tl.constexpr, KW: tl.constexpr, KF: tl.constexpr,
    BM: tl.constexpr, NB: tl.constexpr, NR: tl.constexpr, MEAN: tl.constexpr,
    MASK: tl.constexpr, CAP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A split whose positions do not follow each other: every row looks up its own rotation."""
    K_ROW: tl.constexpr = K_RANK if K_BITS == 0 else K_RANK * K_BITS // 16
    TILE: tl.constexpr = NB * NR
    # not pipelined: gathers of table rows hit the first cache, copies to shared memory would pass by it
    for i_n in tl.range(start, stop, TILE, num_stages=1):
        b_left = (stop - i_n).to(tl.int32)
        m_n = (o_n < b_left)[:, None]
        b_z = latent_tiles(
            k_rows + i_n * K_ROW, k_scale + i_n * K_GROUPS, k_zero + i_n * K_GROUPS,
            o_n[:, None], m_n, o_kw[None, :], K_RANK, K_BITS, K_GROUPS, KW, KF, DTYPE,
        )  # [TILE, KWP]  # fmt: skip
        b_place = tl.load(positions + i_n + o_n, mask=o_n < b_left, other=0)[:, None]
        b_s = tl.zeros((NB, NR, BM), tl.float32)
        # a loop that nobody can unroll, and that reads the expansion again: else registers would spill
        for c in tl.range(n_pieces, num_stages=1):
            o_1, o_2, m_1 = c * HC + o_h, HALF + c * HC + o_h, c * HC + o_h < HALF
            b_up = up_tiles(up, su_r, o_kw, o_1, m_1, K_RANK, KW, KF)
            b_k1 = expanded(b_z, b_up, mean_tile(mean, o_1, m_1, MEAN), KF)  # [TILE, HC]
            b_up = up_tiles(up, su_r, o_kw, o_2, m_1, K_RANK, KW, KF)
            b_k2 = expanded(b_z, b_up, mean_tile(mean, o_2, m_1, MEAN), KF)  # [TILE, HC]
            m_c = m_n & m_1[None, :]
            b_x, b_y = table_row(coarse, n_coarse, b_place // TILE, o_1[None, :], m_c, HALF)
            b_k1, b_k2 = turned(b_k1, b_k2, b_x, b_y)
            b_x, b_y = table_row(fine, TILE, b_place % TILE, o_1[None, :], m_c, HALF)
            b_k1, b_k2 = turned(b_k1, b_k2, b_x, b_y)
            b_s = scores(b_k1, query_tile(p_q, m_m, o_1, m_1), b_s, DTYPE)
            b_s = scores(b_k2, query_tile(p_q, m_m, o_2, m_1), b_s, DTYPE)
        for c in tl.range(RF, num_stages=1):
            o_3, m_3 = 2 * HALF + c * RP + o_r, c * RP + o_r < D - 2 * HALF
            b_up = up_tiles(up, su_r, o_kw, o_3, m_3, K_RANK, KW, KF)
            b_k3 = expanded(b_z, b_up, mean_tile(mean, o_3, m_3, MEAN), KF)
            b_s = scores(b_k3, query_tile(p_q, m_m, o_3, m_3), b_s, DTYPE)
        b_s = capped(b_s * scaling, softcap, CAP)
        b_s = tl.where(visible_rows(mask, i_n, o_t, o_s, b_left, sm_s, sm_n, MASK), b_s, NEG_INF)
        store_weights(b_s, out, lse, i_n, o_t, o_row, m_m, n_tiles, n_all)


@triton.jit(do_not_specialize=["N", "rows_per_split", "S", "n_rows", "Hkv", "k_share", "n_coarse", "n_pieces",
                               "sq_b", "sq_h", "sq_s", "sk_b", "sk_h", "sks_b", "sks_h",
                               "sv_b", "sv_h", "svs_b", "svs_h", "sp_b", "sp_h",
                               "sm_b", "sm_h", "sm_s", "sm_n"])  # fmt: skip
def lowrank_attention_fwd_kernel(
    q, k_rows, k_scale, k_zero, v_rows, v_scale, v_zero, up, mean, positions, coarse, fine, mask, out, lse,
    scaling, softcap, N, rows_per_split, S, n_rows, Hkv, k_share, n_coarse, n_pieces,
    sq_b, sq_h, sq_s, sk_b, sk_h, sks_b, sks_h, sv_b, sv_h, svs_b, svs_h, su_h, su_r, sp_b, sp_h,
    sm_b, sm_h, sm_s, sm_n,
    D: tl.constexpr, HALF: tl.constexpr, HC: tl.constexpr, HF: tl.constexpr, HC_ANY: tl.constexpr,
    RP: tl.constexpr, RF: tl.constexpr,
    K_RANK: tl.constexpr, K_BITS: tl.constexpr, K_GROUPS: tl.constexpr,
    KW: tl.constexpr, KWP: tl.constexpr, KF: tl.constexpr,
    V_RANK: tl.constexpr, V_BITS: tl.constexpr, V_GROUPS: tl.constexpr,
    VW: tl.constexpr, VWP: tl.constexpr, VF: tl.constexpr,
    BM: tl.constexpr, NB: tl.constexpr, NR: tl.constexpr, REBUILD: tl.constexpr, IN_ORDER: tl.constexpr,
    MEAN: tl.constexpr, FUSED: tl.constexpr, UNIT: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = q.dtype.element_ty
    K_ROW: tl.constexpr = K_RANK if K_BITS == 0 else K_RANK * K_BITS // 16
    V_ROW: tl.constexpr = V_RANK if V_BITS == 0 else V_RANK * V_BITS // 16
    TILE: tl.constexpr = NB * NR
    i_m, i_split, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_h = i_bh // Hkv, i_bh % Hkv
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < n_rows
    o_s = o_m % S
    o_t = tl.arange(0, NB)[:, None] * NR + tl.arange(0, NR)[None, :]  # [NB, NR]
    o_n = tl.arange(0, TILE)
    o_kw, o_vw = tl.arange(0, KWP), tl.arange(0, VWP)
    o_h, o_r = tl.arange(0, HC), tl.arange(0, RP)
    o_row = i_bh * n_rows + o_m
    n_tiles, n_all = (N + TILE - 1) // TILE, tl.num_programs(2).to(tl.int64) * n_rows

    k_rows += (i_b * sk_b + i_h // k_share * sk_h) * UNIT
    k_scale += i_b * sks_b + i_h // k_share * sks_h
    k_zero += i_b * sks_b + i_h // k_share * sks_h
    v_rows += (i_b * sv_b + i_h * sv_h) * UNIT
    v_scale += i_b * svs_b + i_h * svs_h
    v_zero += i_b * svs_b + i_h * svs_h
    up += i_h * su_h * UNIT
    su_r *= UNIT
    mean += i_h * D
    positions += i_b * sp_b + i_h * sp_h
    mask += i_b * sm_b + i_h * sm_h

    p_q = q + i_b * sq_b + (i_h * (n_rows // S) + o_m // S) * sq_h + o_s.to(tl.int64) * sq_s
    # 64-bit row numbers: row * D passes 2**31 in long caches
    start = i_split.to(tl.int64) * rows_per_split
    stop = tl.minimum(start + rows_per_split, N)
    if HALF > 0:
        # two loops in two branches: what one keeps in registers does not burden the other
        if not (in_order(positions, start, stop, 512) & IN_ORDER):
            attend_in_any_order(
                p_q, k_rows, k_scale, k_zero, up, mean, positions, coarse, fine, mask, out, lse,
                scaling, softcap, start, stop, n_pieces, n_coarse, n_tiles, n_all, su_r, sm_s, sm_n,
                o_t, o_n, o_s, o_kw, tl.arange(0, HC_ANY), o_r, o_row, m_m,
                D, HALF, HC_ANY, RP, RF, K_RANK, K_BITS, K_GROUPS, KW, KF, BM, NB, NR, MEAN, MASK, CAP, DTYPE,
            )  # fmt: skip
            return
        # row j of a tile turns by j, the query back to the first row
        place = tl.load(positions + start)
        b_q1, b_q2 = query_halves(p_q, m_m, o_h, HALF, HC, HF)
        b_cos, b_sin, b_back1, b_back2 = rotations_in_order(b_q1, b_q2, fine, place % TILE, o_n, o_h, HALF, HC, HF)
        b_up1, b_up2 = up_halves(up, su_r, o_kw, o_h, K_RANK, KW, KF, HALF, HC, HF)
    b_q3, b_up3 = (), ()
    for c in tl.static_range(RF):
        o_3 = 2 * HALF + c * RP + o_r
        b_q3 = b_q3 + (query_tile(p_q, m_m, o_3, o_3 < D),)  # [RP, BM]
        b_up3 = b_up3 + (up_tiles(up, su_r, o_kw, o_3, o_3 < D, K_RANK, KW, KF),)
    b_q = ()
    if not REBUILD:
        for f in tl.static_range(KF):
            b_q = b_q + (query_tile(p_q, m_m, f * KW + o_kw, held(f, o_kw, K_RANK, KW)),)  # [KWP, BM]
    b_m = tl.full((NB, BM), NEG_INF, tl.float32)
    b_l = tl.zeros((NB, 8, BM), tl.float32)
    b_o = ()
    for _ in tl.static_range(VF):
        b_o = b_o + (tl.zeros((NB, VWP, BM), tl.float32),)
    for i_t in tl.range(0, stop - start, TILE):
        i_n = start + i_t
        # 0, but not to the compiler: held in registers the mean would make them spill
        p_mean = mean + i_t // (1 << 40)
        b_left = (stop - i_n).to(tl.int32)
        p_k, p_ks, p_kz = k_rows + i_n * K_ROW, k_scale + i_n * K_GROUPS, k_zero + i_n * K_GROUPS
        b_s = tl.zeros((NB, NR, BM), tl.float32)
        if REBUILD:
            b_z = latent_tiles(
                p_k, p_ks, p_kz, o_n[:, None], (o_n < b_left)[:, None], o_kw[None, :],
                K_RANK, K_BITS, K_GROUPS, KW, KF, DTYPE,
            )  # [TILE, KWP]  # fmt: skip
            for c in tl.static_range(HF):
                o_1, o_2, m_1 = c * HC + o_h, HALF + c * HC + o_h, c * HC + o_h < HALF
                b_k1 = expanded(b_z, b_up1[c], mean_tile(p_mean, o_1, m_1, MEAN), KF)  # [TILE, HC]
                b_k2 = expanded(b_z, b_up2[c], mean_tile(p_mean, o_2, m_1, MEAN), KF)
                b_k1, b_k2 = turned(b_k1, b_k2, b_cos[c], b_sin[c])
                i_row = place // TILE + i_t // TILE
                b_x1, b_x2 = turned_back(b_back1[c], b_back2[c], coarse, n_coarse, i_row, c * HC + o_h, HALF)
                b_s = scores(b_k1, b_x1, b_s, DTYPE)
                b_s = scores(b_k2, b_x2, b_s, DTYPE)
            for c in tl.static_range(RF):
                o_r3 = 2 * HALF + c * RP + o_r
                b_k3 = expanded(b_z, b_up3[c], mean_tile(p_mean, o_r3, o_r3 < D, MEAN), KF)
                b_s = scores(b_k3, b_q3[c], b_s, DTYPE)
        else:
            b_z = latent_tiles(
                p_k, p_ks, p_kz, o_t[:, :, None], (o_t < b_left)[:, :, None], o_kw[None, None, :],
                K_RANK, K_BITS, K_GROUPS, KW, KF, DTYPE,
            )  # [NB, NR, KWP]  # fmt: skip
            for f in tl.static_range(KF):
                b_x = tl.broadcast_to(b_q[f][None, :, :], (NB, KWP, BM))
                b_s = tl.dot(b_z[f], b_x, b_s, input_precision="ieee")
        b_s = capped(b_s * scaling, softcap, CAP)
        b_s = tl.where(visible_rows(mask, i_n, o_t, o_s, b_left, sm_s, sm_n, MASK), b_s, NEG_INF)
        if FUSED:
            b_p, b_m, b_l, b_carry = softmax_step(b_s, b_m, b_l)
            b_v = latent_tiles(
                v_rows + i_n * V_ROW, v_scale + i_n * V_GROUPS, v_zero + i_n * V_GROUPS,
                o_t[:, None, :], (o_t < b_left)[:, None, :], o_vw[None, :, None],
                V_RANK, V_BITS, V_GROUPS, VW, VF, DTYPE,
            )  # [NB, VWP, NR]  # fmt: skip
            b_o_new = ()
            for f in tl.static_range(VF):
                b_acc = tl.dot(b_v[f], b_p.to(DTYPE), b_o[f] * b_carry[:, None, :], input_precision="ieee")
                b_o_new = b_o_new + (b_acc,)
            b_o = b_o_new
        else:
            store_weights(b_s, out, lse, i_n, o_t, o_row, m_m, n_tiles, n_all)

    if FUSED:
        b_share, b_lse = lane_shares(b_m, b_l)
        o_row += i_split * n_all
        for f in tl.static_range(VF):
            b_x = tl.sum(b_o[f] * b_share[:, None, :], 0)  # [VWP, BM]
            m_o = held(f, o_vw, V_RANK, VW)[:, None] & m_m[None, :]
            tl.store(out + o_row[None, :] * V_RANK + (f * VW + o_vw)[:, None], b_x, mask=m_o)
        tl.store(lse + o_row, b_lse, mask=m_m)


@triton.jit(do_not_specialize=["N", "rows_per_split", "n_rows", "G", "sv_b", "sv_h", "svs_b", "svs_h"])
def weighted_latents_fwd_kernel(
    weights, tops, v_rows, v_scale, v_zero, out, lse, N, rows_per_split, n_rows, G, sv_b, sv_h, svs_b, svs_h,
    V_RANK: tl.constexpr, V_BITS: tl.constexpr, V_GROUPS: tl.constexpr,
    VW: tl.constexpr, VWP: tl.constexpr, VF: tl.constexpr,
    BM: tl.constexpr, NR: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = weights.dtype.element_ty
    V_ROW: tl.constexpr = V_RANK if V_BITS == 0 else V_RANK * V_BITS // 16
    V_TILES: tl.constexpr = (VW + VWP - 1) // VWP
    i_m, i_v = tl.program_id(0) // V_TILES, tl.program_id(0) % V_TILES
    i_split, i_bg = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_g = i_bg // G, i_bg % G
    o_m, o_n = i_m * BM + tl.arange(0, BM), tl.arange(0, NR)
    o_w = i_v * VWP + tl.arange(0, VWP)
    m_m = o_m < n_rows
    n_tiles, n_all = (N + TILE - 1) // TILE, tl.num_programs(2).to(tl.int64) * n_rows

    v_rows += (i_b * sv_b + i_g * sv_h) * UNIT
    v_scale += i_b * svs_b + i_g * svs_h
    v_zero += i_b * svs_b + i_g * svs_h
    o_row = i_bg * n_rows + o_m
    p_weights = weights + (o_row * n_tiles)[None, :] * TILE + o_n[:, None]

    b_m = tl.full((BM,), NEG_INF, tl.float32)
    b_l = tl.zeros((NR, BM), tl.float32)
    b_o = ()
    for _ in tl.static_range(VF):
        b_o = b_o + (tl.zeros((VWP, BM), tl.float32),)
    start = i_split.to(tl.int64) * rows_per_split
    stop = tl.minimum(start + rows_per_split, N)
    for i_n in tl.range(start, stop, NR):
        m_n = o_n < (stop - i_n).to(tl.int32)
        b_v = latent_tiles(
            v_rows + i_n * V_ROW, v_scale + i_n * V_GROUPS, v_zero + i_n * V_GROUPS,
            o_n[None, :], m_n[None, :], o_w[:, None], V_RANK, V_BITS, V_GROUPS, VW, VF, DTYPE,
        )  # [VWP, NR]  # fmt: skip
        b_p = tl.load(p_weights + i_n, mask=m_m[None, :] & (o_n >= 0)[:, None], other=0.0)  # [NR, BM]
        b_top = tl.load(tops + i_n // TILE * n_all + o_row, mask=m_m, other=NEG_INF)
        b_m_new = tl.maximum(b_m, b_top)
        b_base = tl.where(b_m_new == NEG_INF, 0.0, b_m_new)
        b_carry, b_share = tl.exp2(b_m - b_base), tl.exp2(b_top - b_base)
        b_p = b_p.to(tl.float32) * b_share[None, :]
        b_l = b_l * b_carry[None, :] + b_p
        b_p = b_p.to(DTYPE)
        b_o_new = ()
        for f in tl.static_range(VF):
            b_acc = tl.dot(b_v[f], b_p, b_o[f] * b_carry[None, :], input_precision="ieee")
            b_o_new = b_o_new + (b_acc,)
        b_o, b_m = b_o_new, b_m_new

    b_l = tl.sum(b_l, 0)
    b_seen = tl.where(b_l > 0, b_l, 1.0)
    o_row += i_split * n_all
    for f in tl.static_range(VF):
        m_o = (o_w < VW)[:, None] & m_m[None, :]
        p_out = out + o_row[None, :] * V_RANK + (f * VW + o_w)[:, None]
        tl.store(p_out, b_o[f] / b_seen[None, :], mask=m_o)
    if i_v == 0:
        b_base = tl.where(b_m == NEG_INF, 0.0, b_m)
        b_lse = tl.where(b_l > 0, b_base / LOG2E + tl.log(b_seen), NEG_INF)
        tl.store(lse + o_row, b_lse, mask=m_m)
