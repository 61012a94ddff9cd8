"""The definition of `sparse_attention`: expand a block, attend, forget it."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.online_softmax import OnlineSoftmax

BLOCK = 1024


def unavailable(device) -> None:
    return None


def sparse_attention(q, keys, values, tail_k=None, tail_v=None, *, scaling, mask=None, softcap=None):
    n_packed, widths = keys.values.shape[2], [side.row_width(q.shape[-1]) for side in (keys, values)]
    state = OnlineSoftmax(q, keys.values.shape[1], scaling, softcap, widths[1])
    for start in range(0, n_packed, BLOCK):
        rows = slice(start, min(start + BLOCK, n_packed))
        k, v = (expand(side, rows, width, q.dtype) for side, width in zip((keys, values), widths))
        state.add(k, v, None if mask is None else mask[..., rows])
    if tail_k is not None and tail_k.shape[2]:
        state.add(tail_k, tail_v, None if mask is None else mask[..., n_packed:])
    return state.result()


def expand(side, rows, head_dim, dtype):
    """Rows of one side, `[B, Hkv, n, head_dim]`: in the dtype of the values; where they are codes in float32, or in
    float64 beside queries of that `dtype`."""
    kept = side.values[:, :, rows]
    if side.bits is not None:
        from hf_kvcache.kernels.quant_pack.reference import quant_unpack

        exact = torch.float64 if dtype == torch.float64 else torch.float32
        grid = side.scale[:, :, rows], side.zero[:, :, rows]
        kept = quant_unpack(kept, *grid, bits=side.bits, axis="token", dtype=exact)
    if side.places is None:
        return kept
    from hf_kvcache.kernels.sparse_pack.reference import sparse_unpack

    return sparse_unpack(kept, side.places[:, :, rows], layout=side.layout, head_dim=head_dim)
