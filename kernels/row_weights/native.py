"""Weights of rows on the CPU in C++ (native.cpp)."""

from __future__ import annotations

import struct

import torch

from hf_kvcache import kernels
from hf_kvcache.kernels import native
from hf_kvcache.kernels.native import rows, rows_contiguous

_CALL = struct.Struct("25q2d")


def unavailable(device) -> str | None:
    return native.unavailable("row_weights", device)


def obstacle(q, k) -> str | None:
    """Why these operands need the reference, or None."""
    return None if k.dtype in kernels.FLOATS else f"k is {k.dtype}"


def row_weights(q, k, positions, first, *, scaling, softcap=None, q_is_real=None, reduce="sum"):
    B, Hkv, N, D = k.shape
    q, k, positions = rows_contiguous(q), rows_contiguous(k), positions.int().contiguous()
    out = torch.empty(B, Hkv, N, dtype=torch.float32)
    real = 0, 0, 0, 0
    if q_is_real is not None:
        batch, head, query = q_is_real.stride()
        # a size of 1 is shared by every head
        real = q_is_real.data_ptr(), batch, head * (q_is_real.shape[1] > 1), query
    fields = (
        *rows(q), *rows(k), positions.data_ptr(), *real, out.data_ptr(), native.DTYPES[q.dtype], native.DTYPES[k.dtype],
        B, Hkv, q.shape[1] // Hkv, q.shape[2], N, D, first, reduce == "max", torch.get_num_threads(),
        scaling, softcap or 0.0,
    )  # fmt: skip
    native.functions["row_weights"](_CALL.pack(*fields))
    return out
