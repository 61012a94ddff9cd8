"""Prune and pack in one pass over the rows; equal to the reference bit by bit.

The k-th largest magnitude is found bit by bit: magnitudes of floating-point numbers are ordered as their bit patterns
are, so nothing is sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.split_kv import unavailable

__all__ = ["obstacle", "sparse_pack", "unavailable"]

TILE = 1024  # channels per program
# bits of a magnitude and the pattern of infinity
FORMATS = {torch.float16: (15, 0x7C00), torch.bfloat16: (15, 0x7F80), torch.float32: (31, 0x7F800000)}


def obstacle(x, keep, layout, group_size, importance) -> str | None:
    """Why the kernel cannot take a call that the reference can, or None."""
    if importance is not None and importance.dtype not in FORMATS:
        return f"importance in {importance.dtype} has no Triton kernel"
    if group_size not in (None, x.shape[3]) and group_size & (group_size - 1):
        return f"groups of {group_size} channels are not a power of two"
    return None


def sparse_pack(x, *, keep, layout, group_size=None, importance=None):
    B, H, n, D = x.shape
    values = torch.empty(B, H, n, keep, dtype=x.dtype, device=x.device)
    n_places = keep if layout == "index" else triton.cdiv(D, 8)
    places = torch.empty(B, H, n, n_places, dtype=torch.uint8, device=x.device)
    if x.numel():
        worth = x if importance is None else importance
        config = pack_config(D, keep, layout, group_size, worth.dtype)
        bits_x, bits_worth = bit_patterns(x), bit_patterns(worth)
        sparse_pack_fwd_kernel[(triton.cdiv(n, config["BN"]), B * H)](
            bits_x, bits_worth, bit_patterns(values), places, n, H, *bits_x.stride()[:3], *bits_worth.stride()[:3],
            **config,
        )  # fmt: skip
    return values, places


def bit_patterns(x):
    """The same memory as integers, which the interpreter handles whatever the type, channels adjacent."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def pack_config(D, keep, layout, group_size, dtype):
    """Compile-time constants of the kernel for one format; `dtype` is that of the importance."""
    group_size = group_size or D
    n_groups, width = triton.next_power_of_2(D // group_size), triton.next_power_of_2(group_size)
    # a bitmap is made of whole bytes
    n_groups = max(n_groups, 8 // width)
    n_bits, infinity = FORMATS[dtype]
    return {
        "D": D, "KEEP": keep, "INDEX": layout == "index", "GS": group_size, "G": n_groups, "GP": width,
        "BN": max(1, TILE // (n_groups * width)), "N_BITS": n_bits, "INFINITY": infinity, "num_warps": 4,
    }  # fmt: skip


@triton.jit(do_not_specialize=["n", "H", "sx_b", "sx_h", "sx_n", "sw_b", "sw_h", "sw_n"])
def sparse_pack_fwd_kernel(
    x, worth, values, places, n, H, sx_b, sx_h, sx_n, sw_b, sw_h, sw_n,
    D: tl.constexpr, KEEP: tl.constexpr, INDEX: tl.constexpr, GS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    BN: tl.constexpr, N_BITS: tl.constexpr, INFINITY: tl.constexpr,
):  # fmt: skip
    SHARE: tl.constexpr = KEEP * GS // D  # kept channels of a group
    i_n, i_bh = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    o_g, o_i = tl.arange(0, G)[None, :, None], tl.arange(0, GP)[None, None, :]
    o_d = o_g * GS + o_i
    m_n = (o_n < n)[:, None, None]
    m_tile = m_n & (o_d < D) & (o_i < GS)  # [BN, G, GP]

    p_worth = worth + i_bh // H * sw_b + i_bh % H * sw_h + o_n[:, None, None] * sw_n + o_d
    b_size = tl.load(p_worth, mask=m_tile, other=0).to(tl.int32) & ((1 << N_BITS) - 1)
    # every NaN is as large as any other; channels that do not exist are the smallest
    b_size = tl.where(m_tile, tl.minimum(b_size, INFINITY + 1), -1)

    # the largest threshold that SHARE channels of a group reach
    b_top = tl.zeros((BN, G), tl.int32)
    for i in tl.static_range(N_BITS):
        b_try = b_top | (1 << (N_BITS - 1 - i))
        b_count = tl.sum((b_size >= b_try[:, :, None]).to(tl.int32), 2)
        b_top = tl.where(b_count >= SHARE, b_try, b_top)

    m_above = b_size > b_top[:, :, None]
    b_tie = (b_size == b_top[:, :, None]).to(tl.int32)
    b_spare = SHARE - tl.sum(m_above.to(tl.int32), 2)
    # the first of equals stay
    m_kept = m_above | ((b_tie != 0) & (tl.cumsum(b_tie, 2) <= b_spare[:, :, None]))
    b_kept = m_kept.to(tl.int32)
    o_row = (i_bh * n + o_n)[:, None, None]
    o_slot = o_row * KEEP + o_g * SHARE + tl.cumsum(b_kept, 2) - 1
    p_x = x + i_bh // H * sx_b + i_bh % H * sx_h + o_n[:, None, None] * sx_n + o_d
    tl.store(values + o_slot, tl.load(p_x, mask=m_tile, other=0), mask=m_kept)
    if INDEX:
        tl.store(places + o_slot, tl.broadcast_to(o_d, m_kept.shape).to(tl.uint8), mask=m_kept)
    else:
        o_byte = tl.arange(0, G * GP // 8)[None, :]
        b_bits = tl.reshape(b_kept, (BN, G * GP // 8, 8)) << tl.arange(0, 8)[None, None, :]
        p_places = places + (i_bh * n + o_n)[:, None] * ((D + 7) // 8) + o_byte
        m_places = (o_n < n)[:, None] & (o_byte < (D + 7) // 8)
        tl.store(p_places, tl.sum(b_bits, 2).to(tl.uint8), mask=m_places)
