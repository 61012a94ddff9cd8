"""The definition of `quant_attention`: unpack a block, attend, forget it."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.online_softmax import OnlineSoftmax
from hf_kvcache.kernels.quant_pack.reference import quant_unpack

BLOCK = 1024


def unavailable(device) -> None:
    return None


def rows_in_use(packed, n_packed):
    """Packed rows without the spare ones behind the first `n_packed` (None: there are none)."""
    n_rows = packed[0].shape[2]
    if n_packed is None or n_packed == n_rows:
        return packed
    return tuple(x[:, :, : x.shape[2] * n_packed // n_rows] for x in packed)


def quant_attention(
    q, keys, values, tail_k=None, tail_v=None, *, bits, key_axis, scaling, mask=None, softcap=None, n_packed=None
):
    k_codes, k_scale, k_zero = rows_in_use(keys, n_packed)
    v_codes, v_scale, v_zero = rows_in_use(values, n_packed)
    n_packed = k_codes.shape[2]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows_per_scale = n_packed // k_scale.shape[2] if n_packed else 1
    state = OnlineSoftmax(q, k_codes.shape[1], scaling, softcap, v_codes.shape[3] * 16 // bits[1])
    for start in range(0, n_packed, BLOCK):
        stop = min(start + BLOCK, n_packed)
        rows, scales = slice(start, stop), slice(start // rows_per_scale, stop // rows_per_scale)
        k_grid, v_grid = (k_scale[:, :, scales], k_zero[:, :, scales]), (v_scale[:, :, rows], v_zero[:, :, rows])
        k = quant_unpack(k_codes[:, :, rows], *k_grid, bits=bits[0], axis=key_axis, dtype=exact)
        v = quant_unpack(v_codes[:, :, rows], *v_grid, bits=bits[1], axis="token", dtype=exact)
        state.add(k, v, None if mask is None else mask[..., rows])
    if tail_k is not None and tail_k.shape[2]:
        state.add(tail_k, tail_v, None if mask is None else mask[..., n_packed:])
    return state.result()
