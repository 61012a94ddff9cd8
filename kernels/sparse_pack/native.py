"""Top-k packing on the CPU in C++ (native.cpp)."""

from __future__ import annotations

import struct

import torch

from hf_kvcache.kernels import native
from hf_kvcache.kernels.native import rows, rows_contiguous
from hf_kvcache.kernels.pages import on_huge_pages

_CALL = struct.Struct("20q")


def unavailable(device) -> str | None:
    return native.unavailable("sparse_pack", device)


def obstacle(x, keep, layout, group_size, importance) -> str | None:
    """Why these operands need the reference, or None."""
    # rounded to float32 its differences could become ties
    return "importance is float64" if importance is not None and importance.dtype == torch.float64 else None


def sparse_pack(x, *, keep, layout, group_size=None, importance=None):
    B, H, n, D = x.shape
    x = rows_contiguous(x)
    weight = x if importance is None else rows_contiguous(importance)
    if weight.dtype not in native.DTYPES:
        weight = weight.float()
    values = on_huge_pages(torch.empty(B, H, n, keep, dtype=x.dtype))
    width = keep if layout == "index" else -(-D // 8)
    places = on_huge_pages(torch.empty(B, H, n, width, dtype=torch.uint8))
    fields = (
        *rows(x), *rows(weight), values.data_ptr(), places.data_ptr(), x.element_size(), native.DTYPES[weight.dtype],
        B, H, n, D, keep, layout == "bitmap", group_size or D, torch.get_num_threads(),
    )  # fmt: skip
    native.functions["sparse_pack"](_CALL.pack(*fields))
    return values, places
