"""Latents read as tiles, keys that are rebuilt from them, and their rotation.

A tile of keys is rebuilt as two halves, the first and the second channel of every rotary pair, so that rotating them
moves nothing between lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAGIC = tl.constexpr(0x4B000000)  # the bits of 2.0**23: an integer below it, or-ed in, is added to it
MAGIC_FLOAT = tl.constexpr(2.0**23)


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
