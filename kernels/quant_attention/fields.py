"""Rows of codes as operands of tensor cores, for kernels that read such rows.

Codes are never converted: an 8-, 4- or 2-bit field left in its place in the word *is* a float16 subnormal,
`code * 2**(place - 24)`, which tensor cores multiply exactly; places are undone by powers of two (README.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_kvcache.kernels.split_kv import fold_rows

ULP = tl.constexpr(2.0**-24)  # the float16 subnormal whose bits are the integer 1

# fields of two words at a time ($0, $1, ... from the last operand): the compiler would handle int16 one by one
ASM_8 = tl.constexpr("""{
    and.b32 $0, $2, 0x00FF00FF;
    prmt.b32 $1, $2, 0, 0x4341;
}""")
ASM_4 = tl.constexpr("""{
    .reg .b32 high;
    shr.b32 high, $4, 8;
    and.b32 $0, $4, 0x000F000F;
    and.b32 $1, $4, 0x00F000F0;
    and.b32 $2, high, 0x000F000F;
    and.b32 $3, high, 0x00F000F0;
}""")
ASM_2 = tl.constexpr("""{
    .reg .b32 high;
    shr.b32 high, $8, 8;
    and.b32 $0, $8, 0x00030003;
    and.b32 $1, $8, 0x000C000C;
    and.b32 $2, $8, 0x00300030;
    and.b32 $3, $8, 0x00C000C0;
    and.b32 $4, high, 0x00030003;
    and.b32 $5, high, 0x000C000C;
    and.b32 $6, high, 0x00300030;
    and.b32 $7, high, 0x00C000C0;
}""")


@triton.jit
def field_tiles(b_words, BITS: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr):
    """Fields of packed words, low bits first, each `code * 2**(place - 24)` with `place` its position in its byte."""
    if ASM and not EXACT and BITS == 8:
        return tl.inline_asm_elementwise(
            ASM_8, "=&r,=&r,r", [b_words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    elif ASM and not EXACT and BITS == 4:
        return tl.inline_asm_elementwise(
            ASM_4, "=&r,=&r,=&r,=&r,r", [b_words], dtype=(tl.float16,) * 4, is_pure=True, pack=2
        )
    elif ASM and not EXACT and BITS == 2:
        return tl.inline_asm_elementwise(
            ASM_2, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [b_words], dtype=(tl.float16,) * 8, is_pure=True, pack=2
        )
    else:
        b_fields = ()
        for f in tl.static_range(16 // BITS):
            b_byte = b_words if f * BITS < 8 else b_words >> 8
            b_field = b_byte & (((1 << BITS) - 1) << (f * BITS % 8))
            if EXACT:
                b_fields = b_fields + (b_field.to(tl.float32) * ULP,)
            else:
                b_fields = b_fields + (b_field.to(tl.float16, bitcast=True),)
        return b_fields


@triton.jit
def query_fields(p_q, o_w, m_m, W: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, DTYPE: tl.constexpr):
    """The query as one tile `[WP, BM]` per field, divided by a power of two so that it fits float16 in every model.

    Returns the tiles, their sums `[BM]` over each group of channels, and the power of two `[BM]`.
    """
    F: tl.constexpr = 16 // BITS
    m_q = (o_w < W)[:, None] & m_m[None, :]
    b_top = tl.zeros((p_q.shape[0],), tl.float32)
    for f in tl.static_range(F):
        b_x = tl.load(p_q[None, :] + (f * W + o_w)[:, None], mask=m_q, other=0.0).to(tl.float32)
        b_top = tl.maximum(b_top, tl.max(tl.abs(b_x), 0))
    # the power of two above b_top and its inverse, from the exponent bits: exp2 and log2 are approximate on a GPU
    b_bits = (tl.where(b_top > 1e-30, b_top, 0.5).to(tl.int32, bitcast=True) & 0x7F800000) + 0x00800000
    b_unit, b_inverse = b_bits.to(tl.float32, bitcast=True), (0x7F000000 - b_bits).to(tl.float32, bitcast=True)
    b_q = ()
    for f in tl.static_range(F):
        b_x = tl.load(p_q[None, :] + (f * W + o_w)[:, None], mask=m_q, other=0.0).to(tl.float32)
        b_q = b_q + ((b_x * b_inverse[None, :]).to(DTYPE),)
    b_q_sum = ()
    for g in tl.static_range(GROUPS):
        b_sum = tl.zeros((p_q.shape[0],), tl.float32)
        for f in tl.static_range(g * F // GROUPS, (g + 1) * F // GROUPS):
            b_sum += tl.sum(b_q[f].to(tl.float32), 0)
        b_q_sum = b_q_sum + (b_sum,)
    return b_q, b_q_sum, b_unit


@triton.jit
def add_codes(
    b_o, b_shift, b_p, b_carry, b_words, scale, zero, o_t, m_t,
    BITS: tl.constexpr, GROUPS: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One step of the sums over values: of codes per field `[NB, WP, BM]`, of what zero points add per group."""
    F: tl.constexpr = 16 // BITS
    CENTRE: tl.constexpr = (2**BITS - 1) / 2
    DTYPE: tl.constexpr = tl.float32 if EXACT else tl.float16
    b_weights, b_shift_new, b_o_new = (), (), ()
    for g in tl.static_range(GROUPS):
        b_scale = tl.load(scale + (o_t * GROUPS + g), mask=m_t, other=0.0).to(tl.float32)
        b_zero = tl.load(zero + (o_t * GROUPS + g), mask=m_t, other=0.0).to(tl.float32)
        b_weights = b_weights + ((b_p * b_scale[:, :, None]).to(DTYPE),)
        b_low = fold_rows(b_p * (b_zero - CENTRE * b_scale)[:, :, None])
        b_shift_new = b_shift_new + (b_shift[g] * b_carry[:, None, :] + b_low,)
    b_v = field_tiles(b_words, BITS, EXACT, ASM)
    for f in tl.static_range(F):
        b_acc = b_o[f] * b_carry[:, None, :]
        b_acc = tl.dot(b_v[f], b_weights[f * GROUPS // F], b_acc, input_precision="ieee")
        b_o_new = b_o_new + (b_acc,)
    return b_o_new, b_shift_new


@triton.jit
def scores_by_token(
    b_q, b_q_sum, b_k, k_scale, k_zero, o_t, m_t,
    BITS: tl.constexpr, CENTRE: tl.constexpr, GROUPS: tl.constexpr, KWP: tl.constexpr,
    BM: tl.constexpr, NB: tl.constexpr, NR: tl.constexpr,
):  # fmt: skip
    """Scores `[NB, NR, BM]` where each row has a scale per group of channels: the scale goes onto the group's score."""
    F: tl.constexpr = 16 // BITS
    b_s = tl.zeros((NB, NR, BM), tl.float32)
    for g in tl.static_range(GROUPS):
        b_scale = tl.load(k_scale + (o_t * GROUPS + g), mask=m_t, other=0.0).to(tl.float32)
        b_zero = tl.load(k_zero + (o_t * GROUPS + g), mask=m_t, other=0.0).to(tl.float32)
        b_part = tl.zeros((NB, NR, BM), tl.float32)
        for f in tl.static_range(g * F // GROUPS, (g + 1) * F // GROUPS):
            b_x = tl.broadcast_to((b_q[f] * (2.0 ** -(f * BITS % 8))).to(b_q[f].dtype)[None, :, :], (NB, KWP, BM))
            b_part = tl.dot(b_k[f], b_x, b_part, input_precision="ieee")
        b_low = (b_zero - CENTRE * b_scale)[:, :, None] * b_q_sum[g][None, None, :]
        b_s += b_part * (b_scale / ULP)[:, :, None] + b_low
    return b_s
