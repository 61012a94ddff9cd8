"""The definition of `dense_attention`, in plain PyTorch: online softmax over blocks of rows."""

from __future__ import annotations

from hf_kvcache.kernels.online_softmax import OnlineSoftmax

BLOCK = 4096


def unavailable(device) -> None:
    return None


def dense_attention(q, k, v, *, scaling, mask=None, softcap=None):
    state = OnlineSoftmax(q, k.shape[1], scaling, softcap, v.shape[-1])
    for start in range(0, k.shape[2], BLOCK):
        rows = slice(start, start + BLOCK)
        state.add(k[:, :, rows], v[:, :, rows], None if mask is None else mask[..., rows])
    return state.result()
