"""Quantise and pack in one pass over the rows; equal to the reference bit by bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.split_kv import unavailable

__all__ = ["obstacle", "quant_pack", "unavailable"]

BLOCK_N = 32  # rows per program on the token axis
HALF_MAX = tl.constexpr(65504.0)
MAGIC = tl.constexpr(8388608.0)  # 2**23: adding it rounds to an integer, half to even, and leaves it in the low bits


def obstacle(x, bits, axis, group_size) -> str | None:
    """Why the kernel cannot take a call that the reference can, or None."""
    if bits == 3:
        return "3 bits have no Triton kernel"
    if axis == "channel" and group_size & (group_size - 1):
        return f"blocks of {group_size} rows are not a power of two"
    if axis == "token" and group_size % (x.shape[3] * bits // 16):
        return f"groups of {group_size} channels do not hold whole fields of {x.shape[3] * bits // 16}"
    return None


def quant_pack(x, *, bits, axis, group_size):
    B, H, n, D = x.shape
    by_channel = axis == "channel"
    n_words = D * bits // 16
    block = group_size if by_channel else BLOCK_N
    codes = torch.empty(B, H, n, n_words, dtype=torch.int16, device=x.device)
    shape = (B, H, n // group_size, D) if by_channel else (B, H, n, D // group_size)
    scale, zero = (torch.empty(shape, dtype=torch.float16, device=x.device) for _ in range(2))
    if x.numel():
        x = x if x.stride(3) == 1 else x.contiguous()
        quant_pack_fwd_kernel[(triton.cdiv(n, block), B * H)](
            x, codes, scale, zero, n, H, *x.stride()[:3],
            **pack_config(D, bits, by_channel, group_size),
        )  # fmt: skip
    return codes, scale, zero


def pack_config(D, bits, by_channel, group_size):
    """Compile-time constants of the kernel for one format."""
    n_words = D * bits // 16
    return {
        "D": D, "BITS": bits, "W": n_words, "WP": triton.next_power_of_2(n_words), "BY_CHANNEL": by_channel,
        "BN": group_size if by_channel else BLOCK_N, "GROUPS": 1 if by_channel else D // group_size,
        # a contracted a * b + c would differ from the reference in the last bit
        "num_warps": 2, "enable_fp_fusion": False,
    }  # fmt: skip


@triton.jit
def half(b_x):
    """Round to float16, clamped to its finite range (NaN stays NaN)."""
    b_x = tl.where(b_x > HALF_MAX, HALF_MAX, tl.where(b_x < -HALF_MAX, -HALF_MAX, b_x))
    return b_x.to(tl.float16)


@triton.jit
def mid_and_step(b_low, b_high, b_nan, CENTRE: tl.constexpr):
    """Zero point and scale of groups that span `[b_low, b_high]`, NaN where `b_nan`."""
    b_low = tl.where(b_nan > 0, float("nan"), b_low)
    b_zero = half((b_low + b_high) * 0.5)
    b_mid = b_zero.to(tl.float32)
    b_above, b_below = b_high - b_mid, b_mid - b_low
    # comparisons with NaN are false, so a NaN comes out of the second branch
    b_extent = tl.where(b_above > b_below, b_above, b_below)
    return b_zero, half(tl.div_rn(b_extent, CENTRE) * (1 + 2**-10))


@triton.jit
def encode(b_x, b_zero, b_scale, CENTRE: tl.constexpr):
    """Codes, int32, of values under broadcastable float16 zero and scale; NaN becomes 0."""
    b_step = b_scale.to(tl.float32)
    b_c = tl.div_rn(b_x - b_zero.to(tl.float32), tl.where(b_step > 0, b_step, 1.0)) + CENTRE
    b_c = tl.where(b_c > 0, tl.where(b_c < 2 * CENTRE, b_c, 2 * CENTRE), 0.0)
    return (b_c + MAGIC).to(tl.int32, bitcast=True) & 0xFF


@triton.jit(do_not_specialize=["n", "H", "sx_b", "sx_h", "sx_n"])
def quant_pack_fwd_kernel(
    x, codes, scale, zero, n, H, sx_b, sx_h, sx_n,
    D: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, BY_CHANNEL: tl.constexpr,
    BN: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    F: tl.constexpr = 16 // BITS
    CENTRE: tl.constexpr = (2**BITS - 1) / 2
    i_n, i_bh = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_n, o_w = i_n * BN + tl.arange(0, BN), tl.arange(0, WP)
    m_n, m_w = o_n < n, o_w < W
    m_tile = m_n[:, None] & m_w[None, :]
    p_x = x + i_bh // H * sx_b + i_bh % H * sx_h + o_n[:, None] * sx_n + o_w[None, :]
    b_words = tl.zeros((BN, WP), tl.int32)
    for g in tl.static_range(GROUPS):
        if BY_CHANNEL:
            for f in tl.static_range(g * F // GROUPS, (g + 1) * F // GROUPS):
                b_x = tl.load(p_x + f * W, mask=m_tile, other=0.0).to(tl.float32)
                b_nan = tl.max((b_x != b_x).to(tl.int32), 0)
                b_zero, b_scale = mid_and_step(tl.min(b_x, 0), tl.max(b_x, 0), b_nan, CENTRE)
                o_scale = (i_bh * tl.num_programs(0) + i_n) * D + f * W + o_w
                tl.store(zero + o_scale, b_zero, mask=m_w)
                tl.store(scale + o_scale, b_scale, mask=m_w)
                b_words |= encode(b_x, b_zero[None, :], b_scale[None, :], CENTRE) << (f * BITS)
        else:
            b_low = tl.full((BN,), float("inf"), tl.float32)
            b_high = tl.full((BN,), float("-inf"), tl.float32)
            b_nan = tl.zeros((BN,), tl.int32)
            for f in tl.static_range(g * F // GROUPS, (g + 1) * F // GROUPS):
                b_x = tl.load(p_x + f * W, mask=m_tile, other=0.0).to(tl.float32)
                b_low = tl.minimum(b_low, tl.min(tl.where(m_w[None, :], b_x, float("inf")), 1))
                b_high = tl.maximum(b_high, tl.max(tl.where(m_w[None, :], b_x, float("-inf")), 1))
                b_nan = tl.maximum(b_nan, tl.max((b_x != b_x).to(tl.int32), 1))
            b_zero, b_scale = mid_and_step(b_low, b_high, b_nan, CENTRE)
            o_scale = (i_bh * n + o_n) * GROUPS + g
            tl.store(zero + o_scale, b_zero, mask=m_n)
            tl.store(scale + o_scale, b_scale, mask=m_n)
            for f in tl.static_range(g * F // GROUPS, (g + 1) * F // GROUPS):
                b_x = tl.load(p_x + f * W, mask=m_tile, other=0.0).to(tl.float32)
                b_words |= encode(b_x, b_zero[:, None], b_scale[:, None], CENTRE) << (f * BITS)
    p_codes = codes + (i_bh * n + o_n)[:, None] * W + o_w[None, :]
    tl.store(p_codes, b_words.to(tl.int16), mask=m_tile)
