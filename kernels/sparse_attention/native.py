"""Attention over sparse rows on the CPU in C++ (native.cpp)."""

from __future__ import annotations

import struct

import torch

from hf_kvcache.kernels import native
from hf_kvcache.kernels.native import QUERIES, queries, rows, rows_contiguous

SIDE = "22q"  # struct Side of sparse_rows.h
# struct Queries of attention.h, then two sides and the tail of native.cpp
_CALL = struct.Struct(QUERIES + 2 * SIDE + "10q")
LAYOUTS = {"bitmap": 1, "index": 2}
_NO_GRID = (0,) * 12
_NO_PLACES = (0,) * 5  # all channels in order


def unavailable(device) -> str | None:
    return native.unavailable("sparse_attention", device)


def obstacle(q, keys, values) -> str | None:
    """Why these operands need the reference, or None."""
    for side in (keys, values):
        if side.bits is None and side.places is None:
            continue
        D = side.row_width(q.shape[-1])
        if D > 256:
            return f"the head size {D} is larger than 256"
        if side.bits is None:
            continue
        if side.bits not in (8, 4, 3, 2):
            return f"codes of {side.bits} bits are not supported"
        if side.scale.dtype != torch.float16 or side.zero.dtype != torch.float16:
            return "scale and zero are not float16"
    return None


def sparse_attention(q, keys, values, tail_k=None, tail_v=None, *, scaling, mask=None, softcap=None):
    n_packed, tail, n_tail = keys.values.shape[2], (0,) * 8, 0
    if tail_k is not None and tail_k.shape[2]:
        tail_k, tail_v = rows_contiguous(tail_k), rows_contiguous(tail_v)
        tail, n_tail = (*rows(tail_k), *rows(tail_v)), tail_k.shape[2]
    q, mask, out, lse, fields = queries(q, keys.values.shape[1], values.row_width(q.shape[3]), mask, scaling, softcap)
    k_fields, k_alive = side_fields(keys)
    v_fields, v_alive = side_fields(values)
    native.functions["sparse_attention"](_CALL.pack(*fields, *k_fields, *v_fields, *tail, n_packed, n_tail))
    del k_alive, v_alive
    return out, lse


def side_fields(side):
    """The fields of `struct Side` and the tensors they point to."""
    values, places, scale, zero = side.values, side.places, side.scale, side.zero
    n, grid, where, keep = values.shape[2], _NO_GRID, _NO_PLACES, values.shape[3]
    if values.stride(3) != 1:
        values = rows_contiguous(values)
    if side.bits is not None:
        scale, zero = rows_contiguous(scale), rows_contiguous(zero)
        strides = *scale.stride()[:3], *zero.stride()[:3]
        grid = scale.data_ptr(), zero.data_ptr(), *strides, n, scale.shape[3], side.bits, False
        keep = keep * 16 // side.bits
    if places is not None:
        places = rows_contiguous(places)
        where = places.data_ptr(), *places.stride()[:3], LAYOUTS[side.layout]
    fields = values.data_ptr(), *values.stride()[:3], *grid, *where, keep
    return fields, (values, places, scale, zero)
