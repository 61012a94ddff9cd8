"""Attention over packed rows on the CPU in C++ (native.cpp)."""

from __future__ import annotations

import struct

from hf_kvcache.kernels import native
from hf_kvcache.kernels.native import QUERIES, queries, rows_contiguous

# struct Queries of attention.h, then two times struct Plane and the tail of native.cpp
_CALL = struct.Struct(QUERIES + "32q" + "10q")


def unavailable(device) -> str | None:
    return native.unavailable("quant_attention", device)


def quant_attention(
    q, keys, values, tail_k=None, tail_v=None, *, bits, key_axis, scaling, mask=None, softcap=None, n_packed=None
):
    if any(x.stride(3) != 1 for x in (*keys, *values)):
        keys, values = ([rows_contiguous(x) for x in packed] for packed in (keys, values))
    n_packed = keys[0].shape[2] if n_packed is None else n_packed
    width = values[0].shape[3] * 16 // bits[1]
    tail, n_tail = (0,) * 8, 0
    if tail_k is not None and tail_k.shape[2]:
        if tail_k.stride(3) != 1 or tail_v.stride(3) != 1:
            tail_k, tail_v = rows_contiguous(tail_k), rows_contiguous(tail_v)
        tail = tail_k.data_ptr(), *tail_k.stride()[:3], tail_v.data_ptr(), *tail_v.stride()[:3]
        n_tail = tail_k.shape[2]
    q, mask, out, lse, fields = queries(q, keys[0].shape[1], width, mask, scaling, softcap)
    plane_k, plane_v = _plane(keys, n_packed, bits[0], key_axis == "channel"), _plane(values, n_packed, bits[1], False)
    native.functions["quant_attention"](_CALL.pack(*fields, *plane_k, *plane_v, *tail, n_packed, n_tail))
    return out, lse


def _plane(packed, n_packed, bits, per_channel):
    """The fields of `struct Plane`."""
    codes, scale, zero = packed
    # for scales per channel the last axis is the channels: one group
    groups = 1 if per_channel else scale.shape[3]
    n_scales = scale.shape[2] * n_packed // codes.shape[2] if codes.shape[2] else 0
    return (
        codes.data_ptr(), *codes.stride()[:3],
        scale.data_ptr(), zero.data_ptr(), *scale.stride()[:3], *zero.stride()[:3],
        n_scales, groups, bits, per_channel,
    )  # fmt: skip
