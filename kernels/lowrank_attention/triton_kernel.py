"""Split-KV decode attention over low-rank latents; softmax and merge are those of `dense_attention`.

A tile of keys is rebuilt as two halves, the first and the second channel of every rotary pair, so that rotating them
moves nothing between lanes. Values are summed as latents, by a second kernel that reads each row once for all the heads
that share it; where every KV head has its own and keys need no rotation, the first kernel does it (README.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.dense_attention.triton_kernel import (
    INTERPRETED,
    LOG2E,
    NEG_INF,
    PROGRAMS_PER_SM,
    capped,
    lane_shares,
    mask_mode,
    mask_strides,
    row_contiguous,
    softmax_step,
    stride_unit,
    unavailable,
    visible_rows,
)
from hf_kvcache.kernels.lowrank_attention import kv_heads
from hf_kvcache.kernels.merge_states.triton_kernel import merge_partials
from hf_kvcache.rope import FINE

__all__ = ["lowrank_attention", "obstacle", "unavailable"]

LANES, LANE_ROWS = 4, 16
TILE = LANES * LANE_ROWS  # rows per iteration: the fine rotary table has a row for each
MIN_SPLIT = 512  # rows below which a split costs more in partial results than it gains
FUSED_RANK = 128  # value latents above this rank do not fit beside the keys
KEPT = 128 * 128  # numbers of an expansion that stays in shared memory
MERGE_WIDTH = 512  # channels that one program merges
assert TILE == FINE

MAGIC = tl.constexpr(0x4B000000)  # the bits of 2.0**23: an integer below it, or-ed in, is added to it
MAGIC_FLOAT = tl.constexpr(2.0**23)


def obstacle(q, keys, values, expansion) -> str | None:
    """Why these kernels cannot take a call that the reference can, or None."""
    for name, side in (("key", keys), ("value", values)):
        if side.rank % 16:
            return f"{name} latents of rank {side.rank} are not whole multiples of 16"
    if keys.rank > 256:
        return f"key latents of rank {keys.rank} are above 256"
    if q.shape[-1] > 256:
        return f"head size {q.shape[-1]} is above 256"
    if expansion is not None and expansion.tables is None and keys.rank * q.shape[-1] > KEPT:
        return f"an expansion of rank {keys.rank} is too large without positions (absorb it into the queries)"
    if q.dtype == torch.float32 and not INTERPRETED:
        return "float32 products do not fit the registers (the interpreter runs them, for tests)"
    return None


def lowrank_attention(q, keys, values, expansion=None, *, scaling, mask=None, softcap=None):
    B, Hq, S, _ = q.shape
    N, Hkv, n_groups, rank = keys.rows.shape[2], kv_heads(keys, values, expansion), values.rows.shape[1], values.rank
    n_rows = Hq // Hkv * S
    rotated = expansion is not None and expansion.tables is not None
    rows_per_split, n_splits = splits(N, B * Hkv * triton.cdiv(n_rows, query_block(n_rows, rotated)), q.device)
    common = {"scaling": scaling, "mask": mask, "softcap": softcap}
    if n_groups == Hkv and rank <= FUSED_RANK and not rotated:
        out, lse = partials(q, n_splits, rank)
        attend(q, keys, values, expansion, out, lse, rows_per_split, Hkv, **common)
    else:
        # weights of whole tiles, and what they were divided by
        n_tiles = triton.cdiv(N, TILE)
        weights = torch.empty(B * Hq * S, n_tiles * TILE, device=q.device, dtype=q.dtype)
        tops = torch.empty(n_tiles, B * Hq * S, device=q.device, dtype=torch.float32)
        attend(q, keys, None, expansion, weights, tops, rows_per_split, Hkv, **common)
        n_rows = Hq // n_groups * S
        config = value_config(n_rows, side_format(values))
        blocks = triton.cdiv(n_rows, config["BM"]) * value_blocks(config)
        rows_per_split, n_splits = splits(N, B * n_groups * blocks, q.device)
        out, lse = partials(q, n_splits, rank)
        sum_values(weights, tops, values, out, lse, rows_per_split, n_rows, config)
    return merged(out, lse, q)


def splits(n_rows, n_programs, device):
    """Rows per split and number of splits that give the device enough programs, `n_programs` of them per split."""
    n_sms = 2 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count
    wanted = max(1, n_sms * PROGRAMS_PER_SM // n_programs)
    rows = max(triton.cdiv(triton.cdiv(n_rows, wanted), TILE) * TILE, MIN_SPLIT)
    return rows, triton.cdiv(n_rows, rows)


def partials(q, n_splits, rank):
    """Workspace: normalised outputs and log-sum-exp of every split."""
    B, Hq, S, _ = q.shape
    out = torch.empty(n_splits, B * Hq * S, rank, device=q.device, dtype=torch.float32)
    return out, torch.empty(n_splits, B * Hq * S, device=q.device, dtype=torch.float32)


def merged(out, lse, q):
    """Output `[B, Hq, S, r_v]` and log-sum-exp `[B, Hq, S]`; wide rows are merged in pieces."""
    (n_splits, n_rows, rank), (B, Hq, S, _) = out.shape, q.shape
    width = rank if rank <= MERGE_WIDTH else min(rank & -rank, MERGE_WIDTH)
    pieces = rank // width
    like = q.new_empty((), dtype=torch.float32).expand(B, Hq, S * pieces, width)
    lse = lse.repeat_interleave(pieces, 1) if pieces > 1 else lse
    out, lse = merge_partials(out.view(n_splits, n_rows * pieces, width), lse, like)
    return out.view(B, Hq, S, rank), lse[:, :, ::pieces]


def attend(q, keys, fused_values, expansion, out, lse, rows_per_split, Hkv, *, scaling, mask, softcap):
    """Fill the partial results; without `fused_values`, weights and their statistics instead."""
    B, Hq, S, D = q.shape
    N, n_rows = keys.rows.shape[2], Hq // Hkv * S
    if N == 0:
        return
    q = q if q.stride(3) == 1 else q.contiguous()
    k_tensors, v_tensors = side_tensors(keys), side_tensors(keys if fused_values is None else fused_values)
    up, mean, positions, tables = (None,) * 4 if expansion is None else expansion
    up = q if up is None else up if up.stride(2) == 1 else up.contiguous()
    unit = stride_unit(k_tensors[0], v_tensors[0], up)
    # tensors that a call does not have are stood in for
    coarse, fine = (q, q) if tables is None else (x.contiguous() for x in tables)
    places = k_tensors[0] if positions is None else positions if positions.stride(2) == 1 else positions.contiguous()
    v_format = None if fused_values is None else side_format(fused_values)
    rotary = None if expansion is None else 0 if tables is None else 2 * fine.shape[2]
    config = key_config(D, n_rows, side_format(keys), v_format, rotary, mean is not None)
    grid = (triton.cdiv(n_rows, config["BM"]), triton.cdiv(N, rows_per_split), B * Hkv)
    lowrank_attention_fwd_kernel[grid](
        q, *k_tensors, *v_tensors, up, q if mean is None else mean.contiguous(), places, coarse, fine,
        q if mask is None else mask.view(torch.uint8), out, lse,
        scaling, softcap or 0.0, N, rows_per_split, S, n_rows, Hkv,
        Hkv // keys.rows.shape[1], coarse.shape[1], triton.cdiv(rotary or 0, 2 * config["HC_ANY"]), *q.stride()[:3],
        *side_strides(k_tensors, unit), *side_strides(v_tensors, unit), *(s // unit for s in up.stride()[:2]),
        places.stride(0), 0 if places.shape[1] == 1 else places.stride(1), *mask_strides(mask),
        **config, UNIT=unit, MASK=mask_mode(mask, S), CAP=softcap is not None,
    )  # fmt: skip


def sum_values(weights, tops, values, out, lse, rows_per_split, n_rows, config):
    """Fill the partial results from weights that several KV heads have for the same rows of values."""
    B, G, N, _ = values.rows.shape
    if N == 0:
        return
    tensors = side_tensors(values)
    unit = stride_unit(tensors[0])
    grid = (triton.cdiv(n_rows, config["BM"]) * value_blocks(config), triton.cdiv(N, rows_per_split), B * G)
    weighted_latents_fwd_kernel[grid](
        weights, tops, *tensors, out, lse, N, rows_per_split, n_rows, G, *side_strides(tensors, unit),
        **config, UNIT=unit,
    )  # fmt: skip


def side_tensors(side):
    """Rows, scale and zero with adjacent rows; the rows stand in for what a side does not have."""
    rows, scale, zero = (None if x is None else row_contiguous(x, x.shape[3]) for x in side[:3])
    if scale is not None and scale.stride() != zero.stride():
        scale, zero = scale.contiguous(), zero.contiguous()
    return tuple(rows if x is None else x for x in (rows, scale, zero))


def side_strides(tensors, unit):
    """Batch and head strides of the rows in units, and of the scale in elements."""
    rows, scale, _ = tensors
    return *(s // unit for s in rows.stride()[:2]), *scale.stride()[:2]


def query_block(n_rows, rotated):
    """Query rows of a KV head per program: keys are rebuilt once for all of them."""
    return min(32 if rotated else 16, max(8, triton.next_power_of_2(n_rows)))


def side_format(side):
    """`(rank, bits, groups)` of one side; 0 bits are rows that are not codes."""
    return format_of(side.rank, side.bits or 0, 0 if side.bits is None else side.scale.shape[3])


def format_of(rank, bits, groups):
    return rank, bits, groups if bits else 0


def side_config(letter, form):
    """Compile-time constants of one side. A row is read as `F` tiles of `W` neighbouring channels.

    Tile `f` of codes is field `f` of every word. Other rows are cut into few powers of two with little padding.
    """
    rank, bits, groups = form
    width = rank * bits // 16 if bits in (8, 4, 2) else min(max(rank & -rank, triton.next_power_of_2(rank) // 4), 128)
    return {
        f"{letter}_RANK": rank, f"{letter}_BITS": bits, f"{letter}_GROUPS": groups,
        f"{letter}W": width, f"{letter}WP": max(16, triton.next_power_of_2(width)),
        f"{letter}F": triton.cdiv(rank, width),
    }  # fmt: skip


def key_config(D, n_rows, keys, values, rotary, mean):
    """Compile-time constants of the first kernel.

    Args:
        D: channels of a query.
        n_rows: query rows of a KV head.
        keys, values: `side_format`; None for values makes it store weights.
        rotary: rotated channels, None without a rebuild of keys.
        mean: whether keys have one.
    """
    half = (rotary or 0) // 2
    rest = 0 if rotary is None else D - rotary
    # chosen by what does not spill (hf_kvcache.kernels.aot): pieces of rotary pairs and of other channels, and whether
    # the table of a tile and, in shared memory, the expansion fit beside the query
    wide, narrow, other = (
        max(16, min(most, triton.next_power_of_2(n))) for most, n in ((64, half), (16, half), (64, rest))
    )
    kept = KEPT // 2 if keys[1] else KEPT
    in_order = n_rows <= 8 and half <= 64 and keys[1] != 3 and keys[0] * D <= kept
    return {
        "D": D, "HALF": half, "HC": wide, "HF": triton.cdiv(half, wide),
        "HC_ANY": narrow, "RP": other, "RF": triton.cdiv(rest, other),
        **side_config("K", keys), **side_config("V", values or keys),
        "BM": query_block(n_rows, half > 0), "NB": LANES, "NR": LANE_ROWS, "REBUILD": rotary is not None,
        "IN_ORDER": in_order, "MEAN": mean, "FUSED": values is not None,
        "num_warps": LANES, "num_stages": 3, "enable_fp_fusion": True,
    }  # fmt: skip


def value_config(n_rows, values):
    """Compile-time constants of the second kernel."""
    rank, bits, _ = values
    config = side_config("V", values)
    if bits in (0, 3):
        # channels are adjacent, so a program takes one tile
        config |= {"VW": rank, "VF": 1}
    # chosen by what does not spill (hf_kvcache.kernels.aot); a warp per 16 channels decodes each code once
    widest = 128 if bits else 256
    width = max(16, min(widest // config["VF"], triton.next_power_of_2(config["VW"])))
    return config | {
        "VWP": width, "BM": min(32, max(8, triton.next_power_of_2(n_rows))), "NR": 32, "TILE": TILE,
        "num_warps": min(4, max(1, width // 16)), "num_stages": 3, "enable_fp_fusion": True,
    }  # fmt: skip


def value_blocks(config):
    """Programs of the second kernel that share the channels of a row."""
    return triton.cdiv(config["VW"], config["VWP"])


@triton.jit
def held(f, o_w, RANK: tl.constexpr, W: tl.constexpr):
    """Which channels of tile `f` a row has."""
    return o_w < W if RANK % W == 0 else (o_w < W) & (f * W + o_w < RANK)


@triton.jit
def latent_words(rows, o_t, m_t, o_w, ROW: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr):
    """Words of codes, which hold all tiles of a row; 0 where each tile is read for itself."""
    if BITS == 8 or BITS == 4 or BITS == 2:
        return tl.load(rows + o_t * ROW + o_w, mask=m_t & (o_w < W), other=0).to(tl.int32)
    else:
        return 0


@triton.jit
def latent_tile(
    b_words, rows, scale, zero, f, o_t, m_t, o_w,
    RANK: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Channels `f * W + o_w` of the rows `o_t`, whose axes the caller chooses."""
    if BITS == 0:
        return tl.load(rows + o_t * RANK + (f * W + o_w), mask=m_t & held(f, o_w, RANK, W), other=0.0)
    else:
        CENTRE: tl.constexpr = (2**BITS - 1) / 2
        SIZE: tl.constexpr = RANK // GROUPS
        o_c = f * W + o_w
        m_c = m_t & held(f, o_w, RANK, W)
        if BITS == 3:
            p_row = rows + o_t * (RANK * 3 // 16)
            b_low = tl.load(p_row + o_c % (RANK // 8), mask=m_c, other=0).to(tl.int32)
            b_high = tl.load(p_row + (RANK // 8 + o_c % (RANK // 16)), mask=m_c, other=0).to(tl.int32)
            b_low = (b_low >> (o_c // (RANK // 8) * 2)) & 3
            b_code = b_low | (((b_high >> (o_c // (RANK // 16))) & 1) << 2)
            b_unit = 1.0
        else:
            # a field stays in its place: its power of two goes to the scale
            b_code = b_words & ((2**BITS - 1) << (f * BITS))
            b_unit = 1.0 / (1 << (f * BITS))
        b_x = (b_code | MAGIC).to(tl.float32, bitcast=True) - MAGIC_FLOAT
        if GROUPS == 1:
            o_g, m_g = o_t, m_t
        elif SIZE % W == 0:
            o_g, m_g = o_t * GROUPS + f * W // SIZE, m_t
        else:
            o_g, m_g = o_t * GROUPS + o_c // SIZE, m_c
        b_scale = tl.load(scale + o_g, mask=m_g, other=0.0).to(tl.float32)
        b_zero = tl.load(zero + o_g, mask=m_g, other=0.0).to(tl.float32)
        return (b_x * (b_scale * b_unit) + (b_zero - CENTRE * b_scale)).to(DTYPE)


@triton.jit
def latent_tiles(
    rows, scale, zero, o_t, m_t, o_w,
    RANK: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr, F: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """All tiles of the rows `o_t`."""
    b_words = latent_words(rows, o_t, m_t, o_w, RANK * BITS // 16, BITS, W)
    b_tiles = ()
    for f in tl.static_range(F):
        b_x = latent_tile(b_words, rows, scale, zero, f, o_t, m_t, o_w, RANK, BITS, GROUPS, W, DTYPE)
        b_tiles = b_tiles + (b_x,)
    return b_tiles


@triton.jit
def up_tiles(up, stride, o_w, o_d, m_d, RANK: tl.constexpr, W: tl.constexpr, F: tl.constexpr):
    """Columns `o_d` of an expansion `[r_k, D]`, in the tiles in which latents come."""
    b_tiles = ()
    for f in tl.static_range(F):
        p_up = up + (f * W + o_w)[:, None] * stride + o_d[None, :]
        b_tiles = b_tiles + (tl.load(p_up, mask=held(f, o_w, RANK, W)[:, None] & m_d[None, :], other=0.0),)
    return b_tiles


@triton.jit
def turned(b_first, b_second, b_cos, b_sin):
    """Both halves after a rotation."""
    return b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin


@triton.jit
def table_row(table, n_rows, o_row, o_h, m, HALF: tl.constexpr):
    """Cosines and sines of row `o_row` of a rotary table."""
    p_cos = table + o_row * HALF + o_h
    return tl.load(p_cos, mask=m, other=0.0), tl.load(p_cos + n_rows * HALF, mask=m, other=0.0)


@triton.jit
def turned_back(b_q1, b_q2, table, n_rows, i_row, o_h, HALF: tl.constexpr):
    """Both halves of queries `[HC, BM]`, float32, turned back by one row of a table."""
    b_cos, b_sin = table_row(table, n_rows, i_row, o_h[:, None], (o_h < HALF)[:, None], HALF)
    return turned(b_q1.to(tl.float32), b_q2.to(tl.float32), b_cos, -b_sin)


@triton.jit
def rotations_in_order(b_q1, b_q2, fine, i_row, o_n, o_h, HALF: tl.constexpr, HC: tl.constexpr, HF: tl.constexpr):
    """Cosines and sines `[TILE, HC]` of the rows of a tile, and queries turned back by the fine part of its place."""
    b_cos, b_sin, b_back1, b_back2 = (), (), (), ()
    for c in tl.static_range(HF):
        o_c = c * HC + o_h
        b_x, b_y = table_row(fine, o_n.shape[0], o_n[:, None], o_c[None, :], (o_c < HALF)[None, :], HALF)
        b_cos, b_sin = b_cos + (b_x,), b_sin + (b_y,)
        b_x1, b_x2 = turned_back(b_q1[c], b_q2[c], fine, o_n.shape[0], i_row, o_c, HALF)
        b_back1, b_back2 = b_back1 + (b_x1,), b_back2 + (b_x2,)
    return b_cos, b_sin, b_back1, b_back2


@triton.jit
def in_order(positions, start, stop, STEP: tl.constexpr):
    """Whether every position is the one before plus one."""
    o_n = tl.arange(0, STEP)
    b_wrong = tl.zeros((STEP,), tl.int32)
    first = tl.load(positions + start)
    for i_n in tl.range(0, stop - start, STEP):
        o_row = i_n + o_n
        m_n = o_row < stop - start
        b_place = tl.load(positions + start + i_n + o_n, mask=m_n, other=0)
        b_wrong |= (m_n & (b_place != first + o_row)).to(tl.int32)
    return tl.max(b_wrong, 0) == 0


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
def mean_tile(mean, o_d, m_d, MEAN: tl.constexpr):
    """Channels `o_d` of the mean key."""
    if MEAN:
        return tl.load(mean + o_d, mask=m_d, other=0.0)
    else:
        return tl.zeros(o_d.shape, tl.float32)


@triton.jit
def expanded(b_z, b_up, b_mean, F: tl.constexpr):
    """Channels of keys `[TILE, C]` from tiles of their latents."""
    b_k = tl.zeros((b_z[0].shape[0], b_up[0].shape[1]), tl.float32) + b_mean[None, :]
    for f in tl.static_range(F):
        b_k = tl.dot(b_z[f], b_up[f], b_k, input_precision="ieee")
    return b_k


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
def up_halves(
    up, stride, o_w, o_h, RANK: tl.constexpr, W: tl.constexpr, F: tl.constexpr,
    HALF: tl.constexpr, HC: tl.constexpr, HF: tl.constexpr,
):  # fmt: skip
    """What expands to the two channels of the rotary pairs, in `HF` pieces of `HC` pairs."""
    b_up1, b_up2 = (), ()
    for c in tl.static_range(HF):
        o_c = c * HC + o_h
        b_up1 = b_up1 + (up_tiles(up, stride, o_w, o_c, o_c < HALF, RANK, W, F),)
        b_up2 = b_up2 + (up_tiles(up, stride, o_w, HALF + o_c, o_c < HALF, RANK, W, F),)
    return b_up1, b_up2


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
