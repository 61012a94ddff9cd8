"""Quantise rows to 8, 4, 3 or 2 bits and pack them; unpack them again."""

from __future__ import annotations

import torch

from hf_kvcache.kernels import select
from hf_kvcache.kernels.quant_pack import reference

__all__ = ["quant_pack", "quant_unpack"]


def quant_pack(
    x: torch.Tensor, *, bits: int, axis: str, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric round-to-nearest quantisation around a mid-point (KIVI, arXiv 2402.02750, section 3).

    A code `c` stands for `scale * (c - (2**bits - 1) / 2) + zero`.

    Args:
        x: rows `[B, H, n, D]`, float16, bfloat16, float32 or float64.
        bits: 8, 4, 3 or 2.
        axis: "channel": one scale per channel and block of `group_size` rows (`n` a multiple of it);
            "token": one scale per row and group of `group_size` channels (`D` a multiple of it).
        group_size: elements that share a scale.

    Returns:
        codes int16 `[B, H, n, D * bits / 16]` (layout: README.md), and scale and zero in float16,
        `[B, H, n / group_size, D]` for "channel", `[B, H, n, D / group_size]` for "token".
        NaN in `x` makes the scale and zero of its group NaN, so that it is not hidden; scales and zeros are clamped
        to the finite range of float16.

    Raises:
        ValueError: bits, axis, group size or shape do not fit.
    """
    check_packing(bits, axis, group_size, x.shape[-1])
    if axis == "channel" and x.shape[2] % group_size:
        raise ValueError(f"{x.shape[2]} rows are not a whole number of blocks of {group_size}")
    run = select("quant_pack", x.device, (x, bits, axis, group_size))
    return run(x, bits=bits, axis=axis, group_size=group_size)


def quant_unpack(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    *,
    bits: int,
    axis: str,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Decode what `quant_pack` returned: `[B, H, n, D]` in `dtype`."""
    return reference.quant_unpack(codes, scale, zero, bits=bits, axis=axis, dtype=dtype)


def check_packing(bits: int, axis: str, group_size: int, head_dim: int) -> None:
    """Raise ValueError unless rows of `head_dim` channels can be packed this way."""
    if bits not in reference.PLANES:
        raise ValueError(f"bits={bits} is not one of {', '.join(map(str, sorted(reference.PLANES)))}")
    if axis not in ("channel", "token"):
        raise ValueError(f"axis={axis!r} is neither 'channel' nor 'token'")
    multiple = reference.WORD // min(reference.PLANES[bits])
    if head_dim % multiple:
        raise ValueError(f"{bits}-bit rows need a head size that is a multiple of {multiple}, this one is {head_dim}")
    if axis == "token" and head_dim % group_size:
        raise ValueError(f"group_size={group_size} does not divide the head size {head_dim}")
