"""The row of a decoded token, alone or with the writing of dense rows: a program of one warp per head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.split_kv import unavailable

__all__ = ["place_rows", "slot_step", "unavailable"]

# one warp: another one would read the ring and the length after this one has written them
CONFIG = {"num_warps": 1}
STRIDES = ["H", "before", "cell", "sa_b", "sa_h", "sm_b", "sr_b", "sr_h", "sr_c", "sl_b", "sl_h"]


def slot_step(alpha, is_real, pending, lengths, position):
    slot = torch.empty(alpha.shape, dtype=torch.int32, device=alpha.device)
    if slot.numel():
        slot_step_fwd_kernel[(slot.numel(),)](
            *decisions(alpha, is_real, pending, lengths, position), slot, PADDED=is_real is not None, **CONFIG
        )
    return slot


def place_rows(k, v, alpha, is_real, pending, lengths, position, k_pages, v_pages, table):
    if alpha.numel():
        k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
        place_rows_fwd_kernel[(alpha.numel(),)](
            *decisions(alpha, is_real, pending, lengths, position), k, v, k_pages, v_pages, table,
            *k.stride()[:2], *v.stride()[:2], *table.stride(),
            PADDED=is_real is not None, **place_config(k_pages.shape[2], k.shape[3], v.shape[3]),
        )  # fmt: skip


def place_config(page, k_size, v_size):
    """Compile-time constants of `place_rows_fwd_kernel` for one shape of pages."""
    sizes = {"KD": k_size, "KP": triton.next_power_of_2(k_size), "VD": v_size, "VP": triton.next_power_of_2(v_size)}
    return {"PAGE": page, **sizes, **CONFIG}


def decisions(alpha, is_real, pending, lengths, position):
    """Arguments that both kernels begin with; alpha stands in for a mask that is not there."""
    n_cells = pending.shape[2]
    alpha = alpha.view(torch.uint8)
    mask, mask_stride = (alpha, 0) if is_real is None else (is_real.view(torch.uint8), is_real.stride(0))
    return (
        alpha, mask, pending, lengths, alpha.shape[1], (position - 1) % n_cells, position % n_cells,
        *alpha.stride(), mask_stride, *pending.stride(), *lengths.stride(),
    )  # fmt: skip


@triton.jit
def take(
    alpha, mask, pending, lengths, i_b, i_h, before, cell, sa_b, sa_h, sm_b, sr_b, sr_h, sr_c, sl_b, sl_h,
    PADDED: tl.constexpr,
):  # fmt: skip
    """The row of the token of one head, -1 for padding; ring and length of the head go on."""
    p_length = lengths + i_b * sl_b + i_h * sl_h
    p_before = pending + i_b * sr_b + i_h * sr_h + before * sr_c
    p_cell = pending + i_b * sr_b + i_h * sr_h + cell * sr_c
    b_is_real = tl.full((), True, tl.int1)
    if PADDED:
        b_is_real = tl.load(mask + i_b * sm_b) != 0
    b_condemns = b_is_real & (tl.load(alpha + i_b * sa_b + i_h * sa_h) != 0)
    b_length, b_before, b_cell = tl.load(p_length), tl.load(p_before), tl.load(p_cell)
    b_before = tl.where(b_condemns & (b_before >= 0), b_before | 1, b_before)
    # with one cell both are the same, so what was just condemned is taken at once
    b_cell = tl.where(before == cell, b_before, b_cell)
    b_is_free = (b_cell >= 0) & (b_cell % 2 == 1)
    b_row = tl.where(b_is_real, tl.where(b_is_free, b_cell // 2, b_length), -1)
    tl.store(p_before, b_before, mask=before != cell)
    tl.store(p_cell, tl.where(b_is_real, 2 * b_row, tl.where(b_is_free, b_cell, -1)))
    tl.store(p_length, b_length + 1, mask=b_is_real & (b_is_free == 0))
    return b_row


@triton.jit(do_not_specialize=STRIDES)
def slot_step_fwd_kernel(
    alpha, mask, pending, lengths, H, before, cell, sa_b, sa_h, sm_b, sr_b, sr_h, sr_c, sl_b, sl_h, slot,
    PADDED: tl.constexpr,
):  # fmt: skip
    i_head = tl.program_id(0).to(tl.int64)
    b_row = take(
        alpha, mask, pending, lengths, i_head // H, i_head % H, before, cell,
        sa_b, sa_h, sm_b, sr_b, sr_h, sr_c, sl_b, sl_h, PADDED,
    )  # fmt: skip
    tl.store(slot + i_head, b_row)


@triton.jit(do_not_specialize=STRIDES + ["sk_b", "sk_h", "sv_b", "sv_h", "st_b", "st_h", "st_m"])
def place_rows_fwd_kernel(
    alpha, mask, pending, lengths, H, before, cell, sa_b, sa_h, sm_b, sr_b, sr_h, sr_c, sl_b, sl_h,
    k, v, k_pages, v_pages, table, sk_b, sk_h, sv_b, sv_h, st_b, st_h, st_m,
    PADDED: tl.constexpr, PAGE: tl.constexpr,
    KD: tl.constexpr, KP: tl.constexpr, VD: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    i_head = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_head // H, i_head % H
    # rows are read before it is known where they go
    o_k, o_v = tl.arange(0, KP), tl.arange(0, VP)
    b_k = tl.load(k + i_b * sk_b + i_h * sk_h + o_k, mask=o_k < KD, other=0)
    b_v = tl.load(v + i_b * sv_b + i_h * sv_h + o_v, mask=o_v < VD, other=0)
    b_row = take(
        alpha, mask, pending, lengths, i_b, i_h, before, cell,
        sa_b, sa_h, sm_b, sr_b, sr_h, sr_c, sl_b, sl_h, PADDED,
    )  # fmt: skip
    i_page = tl.load(table + i_b * st_b + i_h * st_h + b_row // PAGE * st_m, mask=b_row >= 0, other=0).to(tl.int64)
    o_row = i_page * PAGE + b_row % PAGE
    # of padding no channel is written
    tl.store(k_pages + o_row * KD + o_k, b_k, mask=o_k < tl.where(b_row >= 0, KD, 0))
    tl.store(v_pages + o_row * VD + o_v, b_v, mask=o_v < tl.where(b_row >= 0, VD, 0))
