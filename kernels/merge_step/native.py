"""The running mean on the CPU in C++ (native.cpp)."""

from __future__ import annotations

import struct

import torch

from hf_kvcache.kernels import native
from hf_kvcache.kernels.native import rows_contiguous

_CALL = struct.Struct("20q")


def unavailable(device) -> str | None:
    return native.unavailable("merge_step", device)


def obstacle(x, weights, segment) -> str | None:
    """Why these operands need the reference, or None."""
    if weights.dtype != torch.float32:
        return f"weights are {weights.dtype}"
    # the open segment is written to, so a copy would not do
    return None if segment.stride(3) == 1 else "the channels of a member are not adjacent"


def merge_step(x, weights, segment, cell):
    B, H, w, D = segment.shape
    x = rows_contiguous(x)
    out = torch.empty(B, H, D, dtype=x.dtype)
    fields = (
        x.data_ptr(), *x.stride()[:2], weights.data_ptr(), *weights.stride(), segment.data_ptr(), *segment.stride()[:3],
        out.data_ptr(), native.DTYPES[x.dtype], segment.dtype == torch.float32, B, H, w, D, cell,
        torch.get_num_threads(),
    )  # fmt: skip
    native.functions["merge_step"](_CALL.pack(*fields))
    return out
