"""Split-KV decode attention over paged heads of unequal lengths; tiles and softmax are those of `split_kv`.

The rows of all heads are one list of tiles. A program finds the head of its tile by a prefix sum over the lengths, so
the list is never written down, the host need not know it, and a step costs as the sum of the lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.dense_attention.triton_kernel import dense_attention
from hf_kvcache.kernels.merge_states import merge_two
from hf_kvcache.kernels.merge_states.triton_kernel import merge_ragged_partials
from hf_kvcache.kernels.quant_attention.fields import add_codes, field_tiles, query_fields, scores_by_token
from hf_kvcache.kernels.ragged_attention.by_page import by_page
from hf_kvcache.kernels.sparse_attention import classes
from hf_kvcache.kernels.sparse_attention.classes import class_tiles
from hf_kvcache.kernels.split_kv import (
    BLOCK_M,
    INTERPRETED,
    MIN_SPLIT,
    NEG_INF,
    STEP,
    capped,
    lane_shares,
    n_programs,
    size_obstacle,
    softmax_step,
    unavailable,
)

__all__ = ["obstacle", "ragged_attention", "unavailable"]

MAX_TILE = 1024  # rows beyond which a tile no longer evens out heads of unequal lengths


def obstacle(q, keys, values) -> str | None:
    """Why these kernels cannot take a call that the reference can, or None."""
    page = keys.values.shape[2]
    if page < 16 or page & (page - 1):
        return f"pages of {page} rows are not a power of two from 16"
    if is_fused(keys) and is_fused(values):
        return size_obstacle(q, values.row_width(q.shape[-1]))
    if 3 in (keys.bits, values.bits):
        return "3 bits have no Triton kernel"
    from hf_kvcache.kernels.sparse_attention.triton_kernel import obstacle

    return obstacle(q, keys, values)


def is_fused(side):
    """Whether the kernel of this file reads this format."""
    return side.bits != 3 and (side.places is None or side.layout == "bitmap")


def ragged_attention(q, keys, values, table, lengths, tail_k=None, tail_v=None, *, scaling, mask=None, softcap=None):
    pages = attend_pages(q, keys, values, table, lengths, scaling=scaling, softcap=softcap)
    if tail_k is None or not tail_k.shape[2]:
        return pages
    return merge_two(pages, dense_attention(q, tail_k, tail_v, scaling=scaling, mask=mask, softcap=softcap))


def attend_pages(q, keys, values, table, lengths, *, scaling, softcap):
    if not (is_fused(keys) and is_fused(values)):
        from hf_kvcache.kernels.sparse_attention.triton_kernel import sparse_attention

        return by_page(sparse_attention, q, keys, values, table, lengths, scaling=scaling, softcap=softcap)
    (B, Hq, S, D), DV = q.shape, values.row_width(q.shape[-1])
    Hkv, n_pages, page = lengths.shape[1], keys.values.shape[0], keys.values.shape[2]
    n_rows = Hq // Hkv * S
    n_blocks = triton.cdiv(n_rows, BLOCK_M)
    rows_per_tile, n_tiles = tiling(n_pages * page, table.shape[2] * page, B * Hkv, n_blocks, q.device)
    partial_out = torch.empty(n_tiles, n_rows, DV, device=q.device, dtype=torch.float32)
    partial_lse = torch.empty(n_tiles, n_rows, device=q.device, dtype=torch.float32)
    lengths = lengths.contiguous()
    if n_tiles * n_rows:
        q = q if q.stride(3) == 1 else q.contiguous()
        table = table if table.stride(2) == 1 else table.contiguous()
        config = ragged_config(D, side_format(keys, D), side_format(values, DV), page, q.element_size(), DV)
        ragged_attention_fwd_kernel[(n_tiles * n_blocks * config["V_TILES"],)](
            q, *side_tensors(keys), *side_tensors(values), table, lengths, partial_out, partial_lse,
            scaling, softcap or 0.0, B * Hkv, rows_per_tile, S, n_rows, n_blocks, Hkv,
            *q.stride()[:3], *table.stride()[:2],
            **config, CAP=softcap is not None, EXACT=q.dtype == torch.float32, ASM=not INTERPRETED,
        )  # fmt: skip
    return merge_ragged_partials(partial_out, partial_lse, lengths, rows_per_tile, q)


def tiling(n_pool, n_longest, n_heads, n_blocks, device):
    """Rows of a tile, and the number of tiles that no lengths can exceed, from what the host knows.

    Args:
        n_pool: rows that the pages hold.
        n_longest: rows that one head can hold.
        n_heads: heads of all batch rows.
        n_blocks: programs per tile.
    """
    wanted = max(1, n_programs(device) // n_blocks)
    rows = triton.cdiv(triton.cdiv(n_pool, wanted), STEP) * STEP
    rows = min(max(rows, MIN_SPLIT), MAX_TILE)
    return rows, min(n_pool // rows + n_heads, triton.cdiv(n_longest, rows) * n_heads)


def side_format(side, D):
    """`(form, kept channels, bits, groups)` of one side; form "plain" is what needs no expansion by classes."""
    if side.places is None and side.bits is None:
        return "plain", D, 0, 0
    form, keep, bits, groups = classes.side_format(side, D)
    if form == "all" and D % 16 == 0 and D // groups % side.values.shape[3] == 0:
        form = "plain"
    return form, keep, bits, groups


def side_tensors(side):
    """Rows, places, scale and zero, page after page (stores keep them so); the rows stand in for what a side lacks."""
    rows = side.values.contiguous()
    return tuple(rows if x is None else x.contiguous() for x in (rows, side.places, side.scale, side.zero))


def ragged_config(D, keys, values, page, itemsize, DV=None):
    """Compile-time constants of the kernel for one format of each side, of `D` and `DV` channels (None: as many)."""
    DV = D if DV is None else DV
    is_plain = keys[0] == values[0] == "plain"
    v_tiles = 2 if max(D, DV) > 128 and values[2] and is_plain else 1
    if is_plain:
        # wide dense rows take what dense_attention gives them: two warps to a lane, and one step on its way
        wide = max(D, DV) * itemsize > 256 and not values[2]
        config = {"BM": BLOCK_M, "NB": 4, "NR": 16, "num_warps": 8 if wide else 4, "num_stages": 2 if wide else 3}
    else:
        config = classes.sparse_config(D, keys, values, DV)
    for name, size, side, tiles in (("K", D, keys, 1), ("V", DV, values, v_tiles)):
        form, keep, bits, groups = side
        if form == "plain":
            # a field of the words is a class of channels side by side
            words = size * bits // 16 or size
            config |= {
                f"{name}_FORM": form, f"{name}_KEEP": keep, f"{name}_BITS": bits, f"{name}_GROUPS": groups,
                f"{name}_W": size // words, f"{name}_C": max(16, triton.next_power_of_2(words) // tiles),
            }  # fmt: skip
    return config | {"D": D, "DV": DV, "PAGE": page, "V_TILES": v_tiles, "enable_fp_fusion": True}


@triton.jit
def head_of_tile(lengths, i_tile, n_heads, rows_per_tile):
    """The head that owns a tile of the list (`n_heads` behind the end of the list), and the first tile of that head."""
    o_head = tl.arange(0, 128)
    i_head, i_first, n_tiles = 0, 0, 0
    for i in tl.range(0, n_heads, 128):
        m_head = i + o_head < n_heads
        b_tiles = tl.cdiv(tl.load(lengths + i + o_head, mask=m_head, other=0), rows_per_tile)
        m_before = m_head & (n_tiles + tl.cumsum(b_tiles, 0) <= i_tile)
        i_head += tl.sum(m_before.to(tl.int32), 0)
        i_first += tl.sum(tl.where(m_before, b_tiles, 0), 0)
        n_tiles += tl.sum(b_tiles, 0)
    return i_head, i_first


@triton.jit
def pages_of_step(table, i_n, stop, STEP: tl.constexpr, PAGE: tl.constexpr):
    """Pages of rows `i_n` to `i_n + STEP`, a tuple of scalars; 0 behind the end of the head."""
    b_pages = ()
    for j in tl.static_range(max(1, STEP // PAGE)):
        i_row = i_n + j * PAGE
        b_pages = b_pages + (tl.load(table + i_row // PAGE, mask=i_row < stop, other=0),)
    return b_pages


@triton.jit
def rows_in_pool(b_pages, i_n, NB: tl.constexpr, NR: tl.constexpr, PAGE: tl.constexpr):
    """Where rows `i_n` to `i_n + NB * NR` of a head lie in the pool, int64 `[NB, NR]`."""
    o_b = tl.arange(0, NB)
    b_page = tl.zeros((NB,), tl.int32) + b_pages[0]
    for j in tl.static_range(1, max(1, NB * NR // PAGE)):
        b_page = tl.where(o_b >= j * PAGE // NR, b_pages[j], b_page)
    o_in_page = (i_n + o_b * NR) % PAGE
    return (b_page.to(tl.int64) * PAGE + o_in_page)[:, None] + tl.arange(0, NR)[None, :]


@triton.jit(do_not_specialize=["n_heads", "rows_per_tile", "S", "n_rows", "n_blocks", "Hkv",
                               "sq_b", "sq_h", "sq_s", "st_b", "st_h"])  # fmt: skip
def ragged_attention_fwd_kernel(
    q, k_rows, k_places, k_scale, k_zero, v_rows, v_places, v_scale, v_zero, table, lengths, out, lse,
    scaling, softcap, n_heads, rows_per_tile, S, n_rows, n_blocks, Hkv, sq_b, sq_h, sq_s, st_b, st_h,
    D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    K_FORM: tl.constexpr, K_KEEP: tl.constexpr, K_BITS: tl.constexpr, K_GROUPS: tl.constexpr,
    K_W: tl.constexpr, K_C: tl.constexpr,
    V_FORM: tl.constexpr, V_KEEP: tl.constexpr, V_BITS: tl.constexpr, V_GROUPS: tl.constexpr,
    V_W: tl.constexpr, V_C: tl.constexpr, V_TILES: tl.constexpr,
    BM: tl.constexpr, NB: tl.constexpr, NR: tl.constexpr, CAP: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = q.dtype.element_ty
    K_CODES: tl.constexpr = K_FORM == "plain" and K_BITS != 0
    V_CODES: tl.constexpr = V_FORM == "plain" and V_BITS != 0
    KW: tl.constexpr = D // K_W
    VW: tl.constexpr = DV // V_W

    i_program = tl.program_id(0)
    i_tile, i_m, i_v = i_program // (n_blocks * V_TILES), i_program // V_TILES % n_blocks, i_program % V_TILES
    i_head, i_first = head_of_tile(lengths, i_tile, n_heads, rows_per_tile)
    if i_head == n_heads:
        return
    start = (i_tile - i_first) * rows_per_tile
    stop = tl.minimum(start + rows_per_tile, tl.load(lengths + i_head))
    i_b, i_h = (i_head // Hkv).to(tl.int64), i_head % Hkv
    table += i_b * st_b + i_h * st_h

    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < n_rows
    o_t = tl.arange(0, NB)[:, None] * NR + tl.arange(0, NR)[None, :]  # [NB, NR]
    o_kc, o_vc = tl.arange(0, K_C), i_v * V_C + tl.arange(0, V_C)
    p_q = q + i_b * sq_b + (i_h * (n_rows // S) + o_m // S).to(tl.int64) * sq_h + (o_m % S).to(tl.int64) * sq_s
    b_factor = tl.full((BM,), 1.0, tl.float32) * scaling
    if K_CODES:
        b_q, b_q_sum, b_unit = query_fields(p_q, o_kc, m_m, KW, K_BITS, K_GROUPS, tl.float32 if EXACT else tl.float16)
        b_factor *= b_unit
    else:
        b_q = ()
        for j in tl.static_range(K_W):
            o_d = channels(o_kc, j, KW, K_W, K_FORM)
            m_q = (o_d < D)[:, None] & m_m[None, :]
            b_q = b_q + (tl.load(p_q[None, :] + o_d[:, None], mask=m_q, other=0.0),)  # [K_C, BM]

    b_m = tl.full((NB, BM), NEG_INF, tl.float32)
    b_l = tl.zeros((NB, 8, BM), tl.float32)
    b_o, b_shift = (), ()
    for _ in tl.static_range(V_W):
        b_o = b_o + (tl.zeros((NB, V_C, BM), tl.float32),)
    for _ in tl.static_range(V_GROUPS if V_CODES else 0):
        b_shift = b_shift + (tl.zeros((NB, 8, BM), tl.float32),)

    b_pages = pages_of_step(table, start, stop, NB * NR, PAGE)
    for i_n in tl.range(start, stop, NB * NR):
        # what lies behind the end of a head is not loaded: a weight of zero would not hide NaN
        m_t = i_n + o_t < stop
        o_row = rows_in_pool(b_pages, i_n, NB, NR, PAGE)
        b_pages = pages_of_step(table, i_n + NB * NR, stop, NB * NR, PAGE)
        if K_FORM == "plain":
            p_k = k_rows + (o_row[:, :, None] * KW + o_kc[None, None, :])
            b_k = tl.load(p_k, mask=m_t[:, :, None] & (o_kc < KW)[None, None, :], other=0)  # [NB, NR, K_C]
        if V_FORM == "plain":
            p_v = v_rows + (o_row[:, None, :] * VW + o_vc[None, :, None])
            b_v = tl.load(p_v, mask=m_t[:, None, :] & (o_vc < VW)[None, :, None], other=0)  # [NB, V_C, NR]

        if K_CODES:
            b_s = scores_by_token(
                b_q, b_q_sum, field_tiles(b_k, K_BITS, EXACT, ASM), k_scale, k_zero, o_row, m_t,
                K_BITS, (2**K_BITS - 1) / 2, K_GROUPS, K_C, BM, NB, NR,
            )  # fmt: skip
        else:
            if K_FORM == "plain":
                b_tiles = (b_k,)
            else:
                b_tiles = class_tiles(
                    k_rows, k_places, k_scale, k_zero, o_row[:, :, None], o_kc[None, None, :], m_t[:, :, None],
                    D, K_FORM, K_KEEP, K_BITS, K_GROUPS, K_W, 2, DTYPE,
                )  # fmt: skip
            b_s = tl.zeros((NB, NR, BM), tl.float32)
            for j in tl.static_range(K_W):
                b_x = tl.broadcast_to(b_q[j][None, :, :], (NB, K_C, BM))
                b_s = tl.dot(b_tiles[j], b_x, b_s, input_precision="ieee")
        b_s = capped(b_s * b_factor[None, None, :], softcap, CAP)
        b_s = tl.where(m_t[:, :, None], b_s, NEG_INF)
        b_p, b_m, b_l, b_carry = softmax_step(b_s, b_m, b_l)
        if V_CODES:
            b_o, b_shift = add_codes(
                b_o, b_shift, b_p, b_carry, b_v, v_scale, v_zero, o_row, m_t, V_BITS, V_GROUPS, EXACT, ASM
            )
        else:
            if V_FORM == "plain":
                b_tiles = (b_v,)
            else:
                b_tiles = class_tiles(
                    v_rows, v_places, v_scale, v_zero, o_row[:, None, :], o_vc[None, :, None], m_t[:, None, :],
                    DV, V_FORM, V_KEEP, V_BITS, V_GROUPS, V_W, 1, DTYPE,
                )  # fmt: skip
            b_p = b_p.to(DTYPE)
            b_o_new = ()
            for j in tl.static_range(V_W):
                b_acc = b_o[j] * b_carry[:, None, :]
                b_o_new = b_o_new + (tl.dot(b_tiles[j], b_p, b_acc, input_precision="ieee"),)
            b_o = b_o_new

    b_share, b_lse = lane_shares(b_m, b_l)
    o_out = i_tile.to(tl.int64) * n_rows + o_m
    for j in tl.static_range(V_W):
        b_x = b_o[j]
        if V_CODES:
            b_x = b_x * (2.0 ** (24 - j * V_BITS % 8)) + tl.sum(b_shift[j * V_GROUPS // V_W], 1)[:, None, :]
        b_x = tl.sum(b_x * b_share[:, None, :], 0)  # [V_C, BM]
        o_d = channels(o_vc, j, VW, V_W, V_FORM)
        tl.store(out + o_out[None, :] * DV + o_d[:, None], b_x, mask=(o_d < DV)[:, None] & m_m[None, :])
    if i_v == 0:
        tl.store(lse + o_out, b_lse, mask=m_m)


@triton.jit
def channels(o_c, j, STRIDE: tl.constexpr, W: tl.constexpr, FORM: tl.constexpr):
    """Channels of class `j`: stretch `j` of a plain row, else channel `j` of every cell; padding is at D or above."""
    if FORM == "plain":
        return tl.where(o_c < STRIDE, j * STRIDE + o_c, W * STRIDE)
    else:
        return o_c * W + j
