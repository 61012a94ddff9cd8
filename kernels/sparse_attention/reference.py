"""The definition of `sparse_attention`: expand a block, attend, forget it."""

from __future__ import annotations

from hf_kvcache.kernels.dense_attention.reference import OnlineSoftmax
from hf_kvcache.kernels.quant_pack.reference import quant_unpack
from hf_kvcache.kernels.sparse_pack.reference import sparse_unpack

BLOCK = 1024


def unavailable(device) -> None:
    return None


def sparse_attention(q, keys, values, tail_k=None, tail_v=None, *, scaling, mask=None, softcap=None):
    n_packed, D = keys.values.shape[2], q.shape[-1]
    state = OnlineSoftmax(q, keys.values.shape[1], scaling, softcap, D)
    for start in range(0, n_packed, BLOCK):
        rows = slice(start, min(start + BLOCK, n_packed))
        state.add(expand(keys, rows, D), expand(values, rows, D), None if mask is None else mask[..., rows])
    if tail_k is not None and tail_k.shape[2]:
        state.add(tail_k, tail_v, None if mask is None else mask[..., n_packed:])
    return state.result()


def expand(side, rows, head_dim):
    """Rows of one side, `[B, Hkv, n, head_dim]`: in the dtype of the values, float32 where they are codes."""
    kept = side.values[:, :, rows]
    if side.bits is not None:
        kept = quant_unpack(kept, side.scale[:, :, rows], side.zero[:, :, rows], bits=side.bits, axis="token")
    if side.places is None:
        return kept
    return sparse_unpack(kept, side.places[:, :, rows], layout=side.layout, head_dim=head_dim)
