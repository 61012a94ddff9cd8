"""The running mean in one launch: a program per head, which reads its members once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.split_kv import unavailable

__all__ = ["merge_step", "obstacle", "unavailable"]


def obstacle(x, weights, segment) -> str | None:
    """Why the kernel cannot take a call that the reference can, or None."""
    if weights.dtype != torch.float32:
        return f"weights are {weights.dtype}"
    # the open segment is written to, so a copy would not do
    return None if segment.is_contiguous() else "the open segment is not contiguous"


def merge_step(x, weights, segment, cell):
    B, H, w, D = segment.shape
    out = torch.empty(B, H, D, dtype=x.dtype, device=x.device)
    if out.numel():
        config = merge_config(D)
        merge_step_fwd_kernel[(B * H,)](x.contiguous(), weights.contiguous(), segment, out, cell, w, **config)
    return out


def merge_config(D):
    """Compile-time constants of the kernel for one head size."""
    return {"D": D, "DP": triton.next_power_of_2(D), "BW": 16, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["cell", "w"])
def merge_step_fwd_kernel(x, weights, segment, out, cell, w, D: tl.constexpr, DP: tl.constexpr, BW: tl.constexpr):
    i_head = tl.program_id(0).to(tl.int64)
    weights += i_head * w
    segment += i_head * w * D
    o_d, o_w = tl.arange(0, DP), tl.arange(0, BW)
    m_d = o_d < D
    b_x = tl.load(x + i_head * D + o_d, mask=m_d, other=0.0)
    tl.store(segment + cell * D + o_d, b_x, mask=m_d)
    b_total = tl.load(weights + cell)
    b_sum = b_x.to(tl.float32) * b_total
    for i_w in tl.range(0, w, BW):
        o_cell = i_w + o_w
        # the cell that is written here is not read
        b_w = tl.load(weights + o_cell, mask=(o_cell < w) & (o_cell != cell), other=0.0)
        m_tile = (b_w != 0)[:, None] & m_d[None, :]
        b_member = tl.load(segment + (o_cell[:, None] * D + o_d[None, :]), mask=m_tile, other=0.0)
        b_sum += tl.sum(b_member.to(tl.float32) * b_w[:, None], 0)
        b_total += tl.sum(b_w, 0)
    tl.store(out + i_head * D + o_d, b_sum / b_total, mask=m_d)
