"""Attention of prompts on the CPU in C++ (native.cpp)."""

from __future__ import annotations

import struct

import torch

from hf_kvcache.kernels import native
from hf_kvcache.kernels.native import rows, rows_contiguous

_CALL = struct.Struct("28q2d")


def unavailable(device) -> str | None:
    return native.unavailable("prompt_attention", device)


def prompt_attention(q, k, v, *, scaling, is_real=None, softcap=None, own=None):
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    (B, Hq, S, D), (_, Hkv, N, Dv) = q.shape, v.shape
    # heads of a token side by side, as the model goes on with it
    out = torch.empty(B, S, Hq, Dv, dtype=q.dtype).transpose(1, 2)
    lse = torch.empty(B, Hq, S, dtype=torch.float32)
    is_real = None if is_real is None else is_real.contiguous()
    fields = (
        *rows(q), *rows(k), *rows(v), *rows(out), lse.data_ptr(), 0 if is_real is None else is_real.data_ptr(),
        native.DTYPES[q.dtype], B, Hkv, Hq // Hkv, S, N, D, Dv, N - S if own is None else own,
        torch.get_num_threads(), scaling, softcap or 0.0,
    )  # fmt: skip
    native.functions["prompt_attention"](_CALL.pack(*fields))
    return out, lse
