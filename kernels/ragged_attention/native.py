"""Attention over pages of rows on the CPU in C++ (native.cpp)."""

from __future__ import annotations

import struct

from hf_kvcache.kernels import native
from hf_kvcache.kernels.native import QUERIES, queries, rows, rows_contiguous
from hf_kvcache.kernels.sparse_attention.native import SIDE, side_fields
from hf_kvcache.kernels.sparse_attention.native import obstacle as format_obstacle

# struct Queries of attention.h, two times struct Side of sparse_rows.h, struct Pages of native.cpp, Tail of attention.h
_CALL = struct.Struct(QUERIES + 2 * SIDE + "10q" + "10q")


def unavailable(device) -> str | None:
    return native.unavailable("ragged_attention", device)


def obstacle(q, keys, values) -> str | None:
    """Why these operands need the reference, or None."""
    page = keys.values.shape[2]
    if page % 16:
        return f"pages of {page} rows are not a multiple of 16"
    return format_obstacle(q, keys, values)


def ragged_attention(q, keys, values, table, lengths, tail_k=None, tail_v=None, *, scaling, mask=None, softcap=None):
    n_pages, _, page, _ = keys.values.shape
    width = values.row_width(q.shape[3])
    tail, n_tail = (0,) * 8, 0
    if tail_k is not None:
        tail_k, tail_v = rows_contiguous(tail_k), rows_contiguous(tail_v)
        tail, n_tail = (*rows(tail_k), *rows(tail_v)), tail_k.shape[2]
    q, mask, out, lse, fields = queries(q, lengths.shape[1], width, mask, scaling, softcap)
    k_fields, k_alive = side_fields(keys)
    v_fields, v_alive = side_fields(values)
    pages = (
        table.data_ptr(), *table.stride(), lengths.data_ptr(), *lengths.stride(),
        table.shape[2], n_pages, page,
    )  # fmt: skip
    native.functions["ragged_attention"](_CALL.pack(*fields, *k_fields, *v_fields, *pages, *tail, 0, n_tail))
    del k_alive, v_alive
    return out, lse
