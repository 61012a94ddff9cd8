"""Attention over low-rank latents on the CPU in C++ (native.cpp)."""

from __future__ import annotations

import math
import struct

import torch

from hf_kvcache.kernels import native
from hf_kvcache.kernels.native import QUERIES, queries, rows, rows_contiguous

# struct Queries of attention.h, then two times struct Side of latents.h, struct Rebuild and the tail of native.cpp
_CALL = struct.Struct(QUERIES + "36q" + "13q" + "4q")
_NO_GRID = (0,) * 12
_ABSORBED = (0,) * 13


def unavailable(device) -> str | None:
    return native.unavailable("lowrank_attention", device)


def obstacle(q, keys, values, expansion) -> str | None:
    """Why these operands need the reference, or None."""
    for side in (keys, values):
        if side.bits is None:
            continue
        if side.bits not in (8, 4, 3, 2):
            return f"codes of {side.bits} bits are not supported"
        if side.scale.dtype != torch.float16 or side.zero.dtype != torch.float16:
            return "scale and zero are not float16"
    return None


def lowrank_attention(q, keys, values, expansion=None, *, scaling, mask=None, softcap=None):
    n_heads = max(keys.rows.shape[1], values.rows.shape[1]) if expansion is None else expansion.up.shape[0]
    k_fields, k_alive = _side(keys, n_heads)
    v_fields, v_alive = _side(values, n_heads)
    rebuild, alive = _ABSORBED, None
    # heads of one item: those that share latents and, where one table of angles serves all heads, all of them
    span = math.lcm(n_heads // keys.rows.shape[1], n_heads // values.rows.shape[1])
    if expansion is not None:
        rebuild, alive = _rebuild(expansion)
        if expansion.positions is not None and expansion.positions.shape[1] == 1:
            span = n_heads
    dtype = native.DTYPES[q.dtype]
    q, mask, out, lse, fields = queries(q.float(), n_heads // span, values.rank, mask, scaling, softcap)
    tail = dtype, n_heads, span, keys.rows.shape[2]
    native.functions["lowrank_attention"](_CALL.pack(*fields, *k_fields, *v_fields, *rebuild, *tail))
    del k_alive, v_alive, alive
    return out, lse


def _side(side, n_heads):
    """The fields of `struct Side` and the tensors they point to."""
    latents, scale, zero = rows_contiguous(side.rows), side.scale, side.zero
    grid = _NO_GRID
    if side.bits is not None:
        scale, zero = rows_contiguous(scale), rows_contiguous(zero)
        (scale_at, *scale_strides), (zero_at, *zero_strides) = rows(scale), rows(zero)
        grid = scale_at, zero_at, *scale_strides, *zero_strides, latents.shape[2], scale.shape[3], side.bits, False
    return (*rows(latents), *grid, side.rank, n_heads // latents.shape[1]), (latents, scale, zero)


def _rebuild(expansion):
    """The fields of `struct Rebuild` and the tensors they point to."""
    up, mean, positions, tables = rows_contiguous(expansion.up), expansion.mean, expansion.positions, expansion.tables
    mean_fields, place_fields = (0, 0), (0,) * 8
    if mean is not None:
        mean = rows_contiguous(mean.float())
        mean_fields = mean.data_ptr(), mean.stride(0)
    if positions is not None:
        positions = rows_contiguous(positions.int())
        coarse, fine = (x.float().contiguous() for x in tables)
        batch, head, _ = positions.stride()
        place_fields = (
            positions.data_ptr(), batch, head * (positions.shape[1] > 1),
            coarse.data_ptr(), fine.data_ptr(), coarse.shape[1], fine.shape[1], fine.shape[2],
        )  # fmt: skip
        tables = coarse, fine
    return (up.data_ptr(), up.stride(0), up.stride(1), *mean_fields, *place_fields), (up, mean, positions, tables)
