"""Attention over any view, block by block: the fallback for every format, and the path of long query chunks."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.dense_attention.reference import OnlineSoftmax

BLOCK = 1024


def attend_blocks(q, view, *, scaling, mask=None, softcap=None) -> torch.Tensor:
    """Attend over the rows of `view` without expanding more than one block of them.

    Args:
        q: queries `[B, Hq, S, D]`.
        view: a `KVView`.
        scaling, mask, softcap: as in `kernels.dense_attention`.

    Returns:
        The output `[B, Hq, S, D]` in the dtype of `q`.
    """
    state, start = None, 0
    for k, v in view.blocks(BLOCK):
        if state is None:
            state = OnlineSoftmax(q, k.shape[1], scaling, softcap, v.shape[-1])
        rows = slice(start, start + k.shape[2])
        state.add(k, v, None if mask is None else mask[..., rows])
        start = rows.stop
    return state.result()[0]
