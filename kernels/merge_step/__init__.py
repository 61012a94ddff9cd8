"""The running mean of an open segment, one token on: constant work per step."""

from __future__ import annotations

import torch

from hf_kvcache.kernels import select

__all__ = ["merge_step"]


def merge_step(x: torch.Tensor, weights: torch.Tensor, segment: torch.Tensor, cell: int) -> torch.Tensor:
    """Put a token among the newest of its head and return their weighted mean (DMC, arXiv 2403.09636).

    `mean = sum_i weights_i segment_i / sum_i weights_i`, in float32 (float64 for a segment of float64), with
    `segment[:, :, cell] = x` written first.

    Args:
        x: the new token, `[B, Hkv, D]`, float16, bfloat16, float32 or float64.
        weights: of every cell, float32 `[B, Hkv, w]`, zero for what is not part of the open segment; that of `cell` is
            positive.
        segment: the newest `w` tokens in a ring, `[B, Hkv, w, D]`: in the dtype of `x`, or in float32. Written to.
        cell: where in the ring the token belongs.

    Returns:
        The mean, `[B, Hkv, D]` in the dtype of `x`.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    check_operands(x, weights, segment, cell)
    return select("merge_step", x.device, (x, weights, segment))(x, weights, segment, cell)


def check_operands(x, weights, segment, cell):
    B, H, D = x.shape
    w = weights.shape[-1]
    if weights.shape != (B, H, w) or segment.shape != (B, H, w, D) or not 0 <= cell < w:
        raise ValueError(
            f"x {list(x.shape)}, weights {list(weights.shape)} and segment {list(segment.shape)} must be [B, Hkv, D], "
            f"[B, Hkv, w] and [B, Hkv, w, D], cell={cell} below w"
        )
    if segment.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"segment is {segment.dtype}, the token is {x.dtype}")
