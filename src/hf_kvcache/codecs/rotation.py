"""Orthogonal mixing of channels, so that an outlier channel is shared out before rounding."""

from __future__ import annotations

from functools import lru_cache
from math import pi

import torch


@lru_cache(maxsize=64)
def hadamard(size: int, device: torch.device) -> torch.Tensor:
    """Block-diagonal normalised Hadamard matrix `[size, size]` in float32 (symmetric, its own inverse).

    The blocks are as large as the largest power of two that divides `size` (QuaRot, arXiv 2404.00456, section 3).
    """
    block = size & -size
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / block**0.5] * (size // block)).to(device)


@lru_cache(maxsize=64)
def mixing(size: int, device: torch.device) -> torch.Tensor:
    """Orthogonal matrix `[size, size]` in float32 in which every entry is about as large: for folding into weights.

    Hadamard where `size` is a power of two, else the discrete cosine transform, which exists at every size.
    """
    if size & (size - 1) == 0:
        return hadamard(size, device)
    n = torch.arange(size, dtype=torch.float64)
    matrix = (torch.outer(n + 0.5, n) * (pi / size)).cos() * (2 / size) ** 0.5
    matrix[:, 0] *= 0.5**0.5
    return matrix.float().to(device)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Multiply the last axis of `x` by the Hadamard matrix; twice is the identity."""
    return (x.float() @ hadamard(x.shape[-1], x.device)).to(x.dtype)
