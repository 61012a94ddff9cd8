"""The definition of `lowrank_attention`: rebuild the keys of a block, attend, forget them."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.online_softmax import OnlineSoftmax
from hf_kvcache.rope import rotate

BLOCK = 1024


def unavailable(device) -> None:
    return None


def lowrank_attention(q, keys, values, expansion=None, *, scaling, mask=None, softcap=None):
    n_kv_heads = max(keys.rows.shape[1], values.rows.shape[1]) if expansion is None else expansion.up.shape[0]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    state = OnlineSoftmax(q.to(compute), n_kv_heads, scaling, softcap, values.rank)
    for start in range(0, keys.rows.shape[2], BLOCK):
        rows = slice(start, start + BLOCK)
        k = _per_head(_unpacked(keys, rows, compute), n_kv_heads)  # [B, Hkv, n, r_k]
        v = _per_head(_unpacked(values, rows, compute), n_kv_heads)  # [B, Hkv, n, r_v]
        if expansion is not None:
            k = _rebuilt(k, expansion, rows)  # [B, Hkv, n, D]
        state.add(k, v, None if mask is None else mask[..., rows])
    return state.result()


def _unpacked(side, rows, dtype):
    latents = side.rows[:, :, rows]
    if side.bits is None:
        return latents.to(dtype)
    from hf_kvcache.kernels.quant_pack.reference import quant_unpack

    scale, zero = side.scale[:, :, rows], side.zero[:, :, rows]
    return quant_unpack(latents, scale, zero, bits=side.bits, axis="token", dtype=dtype)


def _per_head(latents, n_kv_heads):
    """`[B, G, n, r]` seen by every head: `[B, Hkv, n, r]`."""
    return latents.repeat_interleave(n_kv_heads // latents.shape[1], 1)


def _rebuilt(latents, expansion, rows):
    k = latents @ expansion.up.to(latents.dtype)
    if expansion.mean is not None:
        k = k + expansion.mean.to(k.dtype).unsqueeze(1)
    if expansion.positions is None:
        return k
    cos, sin = expansion.tables.cos_sin(expansion.positions[:, :, rows])
    return rotate(k, cos.to(k.dtype), sin.to(k.dtype))
