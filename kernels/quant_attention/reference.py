"""The definition of `quant_attention`: unpack a block, attend, forget it."""

from __future__ import annotations

from hf_kvcache.kernels.dense_attention.reference import OnlineSoftmax
from hf_kvcache.kernels.quant_pack.reference import quant_unpack

BLOCK = 1024


def unavailable(device) -> None:
    return None


def quant_attention(q, keys, values, tail_k=None, tail_v=None, *, bits, key_axis, scaling, mask=None, softcap=None):
    k_codes, k_scale, k_zero = keys
    v_codes, v_scale, v_zero = values
    n_packed = k_codes.shape[2]
    rows_per_scale = n_packed // k_scale.shape[2] if n_packed else 1
    state = OnlineSoftmax(q, k_codes.shape[1], scaling, softcap, q.shape[-1])
    for start in range(0, n_packed, BLOCK):
        stop = min(start + BLOCK, n_packed)
        rows, scales = slice(start, stop), slice(start // rows_per_scale, stop // rows_per_scale)
        k = quant_unpack(k_codes[:, :, rows], k_scale[:, :, scales], k_zero[:, :, scales], bits=bits[0], axis=key_axis)
        v = quant_unpack(v_codes[:, :, rows], v_scale[:, :, rows], v_zero[:, :, rows], bits=bits[1], axis="token")
        state.add(k, v, None if mask is None else mask[..., rows])
    if tail_k is not None and tail_k.shape[2]:
        state.add(tail_k, tail_v, None if mask is None else mask[..., n_packed:])
    return state.result()
