"""Quantise and pack on the CPU in C++ (native.cpp)."""

from __future__ import annotations

import struct

import torch

from hf_kvcache.kernels import native
from hf_kvcache.kernels.native import rows, rows_contiguous
from hf_kvcache.kernels.pages import on_huge_pages

_CALL = struct.Struct("16q")


def unavailable(device) -> str | None:
    return native.unavailable("quant_pack", device)


def quant_pack(x, *, bits, axis, group_size):
    B, H, n, D = x.shape
    x = rows_contiguous(x)
    codes = on_huge_pages(torch.empty(B, H, n, D * bits // 16, dtype=torch.int16))
    per_channel = axis == "channel"
    shape = (B, H, n // group_size, D) if per_channel else (B, H, n, D // group_size)
    scale, zero = (on_huge_pages(torch.empty(shape, dtype=torch.float16)) for _ in range(2))
    fields = (
        *rows(x), codes.data_ptr(), scale.data_ptr(), zero.data_ptr(),
        native.DTYPES[x.dtype], B, H, n, D, bits, per_channel, group_size, torch.get_num_threads(),
    )  # fmt: skip
    native.functions["quant_pack"](_CALL.pack(*fields))
    return codes, scale, zero
