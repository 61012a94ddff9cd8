"""Sparse rows expanded in registers, for kernels that read such rows.

A row is expanded by classes: class `j` holds the channels `W * c + j` of all cells `c` of `W` bits of the bitmap, so
that a running count per cell gives the place of every kept value and nothing is ever interleaved. Each class is a
product of its own (README.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_kvcache.kernels.split_kv import BLOCK_M


def side_format(side, D):
    """`(form, kept channels, bits, groups)` of one side, for `sparse_config`."""
    if side.places is None:
        form = "all"
    elif side.layout == "index":
        form = "index"
    elif side.group_size == 4 and side.keep * 2 == D and side.bits is None and D >= 64:
        form = "pairs"
    else:
        form = "bitmap"
    return form, side.keep, side.bits or 0, 0 if side.bits is None else side.scale.shape[3]


def sparse_config(D, keys, values, DV=None):
    """Compile-time constants of the kernel for one format of each side, of `D` and `DV` channels (None: as many)."""
    config = {"D": D, "DV": D if DV is None else DV}
    for name, size, (form, keep, bits, groups) in (("K", D, keys), ("V", config["DV"], values)):
        # the widest cells of which there are 16: a product needs as many
        width = 4 if form == "pairs" else next(w for w in (8, 4, 2, 1) if w == 1 or size > 8 * w)
        config |= {
            f"{name}_FORM": form, f"{name}_KEEP": keep, f"{name}_BITS": bits, f"{name}_GROUPS": groups,
            f"{name}_W": width, f"{name}_C": max(16, triton.next_power_of_2(triton.cdiv(size, width))),
        }  # fmt: skip
    # chosen by what does not spill (hf_kvcache.kernels.aot): with fewer lanes several warps share the gathers of one
    lanes = min(4, 256 // triton.next_power_of_2(max(D, config["DV"])))
    num_warps = 8 if lanes == 1 and D != config["DV"] else 4
    return config | {
        "BM": BLOCK_M, "NB": lanes, "NR": 16, "num_warps": num_warps, "num_stages": 2, "enable_fp_fusion": True,
    }  # fmt: skip


@triton.jit
def count_bits(b_x):
    """Set bits of every byte."""
    b_x = b_x - ((b_x >> 1) & 0x55)
    b_x = (b_x & 0x33) + ((b_x >> 2) & 0x33)
    return (b_x + (b_x >> 4)) & 0xF


@triton.jit
def load_cells(places, o_t, o_c, m_t, D: tl.constexpr, W: tl.constexpr):
    """Cells of `W` bits of the bitmap, int32."""
    p_byte = places + o_t * ((D + 7) // 8) + o_c * W // 8
    b_byte = tl.load(p_byte, mask=m_t & (o_c * W < D), other=0).to(tl.int32)
    return (b_byte >> (o_c * W % 8)) & ((1 << W) - 1)


@triton.jit
def value_pairs(values, o_t, o_c, m_tile, KEEP: tl.constexpr, DTYPE: tl.constexpr):
    """First and second kept value of every cell of the 2:4 pattern."""
    if DTYPE.primitive_bitwidth == 32:
        p_values = values + (o_t * KEEP + o_c * 2)
        return tl.load(p_values, mask=m_tile, other=0.0), tl.load(p_values + 1, mask=m_tile, other=0.0)
    else:
        p_pairs = values.to(tl.pointer_type(tl.int32), bitcast=True) + (o_t * (KEEP // 2) + o_c)
        b_pair = tl.load(p_pairs, mask=m_tile, other=0)
        b_first, b_second = (b_pair & 0xFFFF).to(tl.int16), (b_pair >> 16).to(tl.int16)
        return b_first.to(DTYPE, bitcast=True), b_second.to(DTYPE, bitcast=True)


@triton.jit
def class_tiles(
    values, places, scale, zero, o_t, o_c, m_t,
    D: tl.constexpr, FORM: tl.constexpr, KEEP: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
    W: tl.constexpr, AXIS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Expand rows `o_t` to `W` tiles; tile `j` holds channel `W * c + j` of every cell `c`, zero where dropped."""
    b_tiles = ()
    if FORM == "pairs":
        b_cell = load_cells(places, o_t, o_c, m_t, D, W)
        b_first, b_second = value_pairs(values, o_t, o_c, m_t & (o_c * W < D), KEEP, DTYPE)
        for j in tl.static_range(W):
            # the first channel of four can only be the first of two, the last only the second
            if j == 0:
                b_x = b_first
            elif j == 3:
                b_x = b_second
            else:
                b_x = tl.where((b_cell & ((1 << j) - 1)) == 0, b_first, b_second)
            b_tiles = b_tiles + (tl.where((b_cell & (1 << j)) != 0, b_x, 0.0),)
    else:
        if FORM == "all":
            b_cell = tl.where(m_t & (o_c * W < D), (1 << W) - 1, 0)
            b_rank = tl.zeros_like(b_cell) + o_c * W
        else:
            b_cell = load_cells(places, o_t, o_c, m_t, D, W)
            b_count = count_bits(b_cell)
            b_rank = tl.cumsum(b_count, AXIS) - b_count
        p_row = values + o_t * (KEEP if BITS == 0 else KEEP * BITS // 16)
        for j in tl.static_range(W):
            b_kept = (b_cell >> j) & 1
            m_kept = (b_kept != 0) & (b_rank < KEEP) if FORM == "all" else b_kept != 0
            if BITS == 0:
                b_x = tl.load(p_row + b_rank, mask=m_kept, other=0.0)
            else:
                b_x = decode(p_row, scale, zero, o_t, m_t, b_rank, m_kept, KEEP, BITS, GROUPS).to(DTYPE)
            b_tiles = b_tiles + (b_x,)
            b_rank += b_kept
    return b_tiles


@triton.jit
def decode(p_row, scale, zero, o_t, m_t, b_rank, m_kept, KEEP: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """Kept values number `b_rank` of rows of codes, float32, zero where nothing is kept."""
    ROW: tl.constexpr = KEEP * BITS // 16
    CENTRE: tl.constexpr = (2**BITS - 1) / 2
    # unsigned: a division by a constant is one multiplication
    b_at = b_rank.to(tl.uint32)
    b_word = tl.load(p_row + (b_at % ROW).to(tl.int32), mask=m_kept, other=0).to(tl.int32)
    b_code = (b_word >> (b_at // ROW * BITS).to(tl.int32)) & ((1 << BITS) - 1)
    o_group = o_t * GROUPS + (b_at // (KEEP // GROUPS)).to(tl.int32) if GROUPS > 1 else o_t
    m_group = m_kept if GROUPS > 1 else m_t
    b_scale = tl.load(scale + o_group, mask=m_group, other=0.0).to(tl.float32)
    b_zero = tl.load(zero + o_group, mask=m_group, other=0.0).to(tl.float32)
    return tl.where(m_kept, (b_code.to(tl.float32) - CENTRE) * b_scale + b_zero, 0.0)
