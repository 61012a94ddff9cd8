"""Dense attention on the CPU in C++ (native.cpp)."""

from __future__ import annotations

import struct

import torch

from hf_kvcache.kernels import native

# struct Queries of attention.h: addresses, strides and sizes, then scaling and softcap
QUERIES = "18q2d"
_CALL = struct.Struct(QUERIES + "9q")


def unavailable(device) -> str | None:
    return native.unavailable("dense_attention", device)


def dense_attention(q, k, v, *, scaling, mask=None, softcap=None):
    if k.stride(3) != 1 or v.stride(3) != 1:
        k, v = rows_contiguous(k), rows_contiguous(v)
    q, mask, out, lse, fields = queries(q, k.shape[1], v.shape[3], mask, scaling, softcap)
    where = k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3], k.shape[2]
    native.function("dense_attention")(_CALL.pack(*fields, *where))
    return out, lse


def queries(q, n_kv_heads, width, mask, scaling, softcap):
    """Outputs of a call and the fields of `struct Queries`; q and mask come back because they must stay alive."""
    B, Hq, S, D = q.shape
    if q.stride(3) != 1:
        q = rows_contiguous(q)
    out = torch.empty(B, Hq, S, width, dtype=q.dtype)
    lse = torch.empty(B, Hq, S, dtype=torch.float32)
    mask_fields = 0, 0, 0, 0
    if mask is not None:
        mask = rows_contiguous(mask)
        batch, head, query, _ = mask.stride()
        # a size of 1 is shared by every batch row or head
        mask_fields = mask.data_ptr(), batch * (mask.shape[0] > 1), head * (mask.shape[1] > 1), query
    fields = (
        q.data_ptr(), *q.stride()[:3], out.data_ptr(), lse.data_ptr(), *mask_fields,
        native.DTYPES[q.dtype], B, n_kv_heads, Hq // n_kv_heads, S, D, width, torch.get_num_threads(),
        scaling, softcap or 0.0,
    )  # fmt: skip
    return q, mask, out, lse, fields


def rows(x):
    """Address of `[B, H, n, D]` and its strides over batch, head and row."""
    batch, head, row, _ = x.stride()
    return x.data_ptr(), batch, head, row


def rows_contiguous(x):
    """`x`, copied only where the elements of a row are not adjacent."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
