"""Dense attention on the CPU in C++ (native.cpp)."""

from __future__ import annotations

import struct

from hf_kvcache.kernels import native
from hf_kvcache.kernels.native import QUERIES, queries, rows_contiguous

_CALL = struct.Struct(QUERIES + "9q")


def unavailable(device) -> str | None:
    return native.unavailable("dense_attention", device)


def dense_attention(q, k, v, *, scaling, mask=None, softcap=None):
    if k.stride(3) != 1 or v.stride(3) != 1:
        k, v = rows_contiguous(k), rows_contiguous(v)
    q, mask, out, lse, fields = queries(q, k.shape[1], v.shape[3], mask, scaling, softcap)
    where = k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3], k.shape[2]
    native.functions["dense_attention"](_CALL.pack(*fields, *where))
    return out, lse
