"""Attention block by block: the fallback for every format, the path of long query chunks, and of sinks."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.online_softmax import OnlineSoftmax

BLOCK = 1024
QUERY_BLOCK = 256


def attend_blocks(q, view, *, scaling, mask=None, softcap=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over the rows of `view` without expanding more than one block of them.

    Args:
        q: queries `[B, Hq, S, D]`.
        view: a `KVView`.
        scaling, mask, softcap: as in `kernels.dense_attention`.

    Returns:
        The output `[B, Hq, S, Dv]` in the dtype of `q`, and the log-sum-exp of the scores `[B, Hq, S]`.
    """
    state, start = None, 0
    for k, v in view.blocks(BLOCK):
        if state is None:
            state = OnlineSoftmax(q, k.shape[1], scaling, softcap, v.shape[-1])
        rows = slice(start, start + k.shape[2])
        state.add(k, v, None if mask is None else mask[..., rows])
        start = rows.stop
    return state.result()


def attend_dense(q, k, v, *, scaling, mask=None, is_causal=True, softcap=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of any number of queries with its log-sum-exp, in blocks of queries and of rows.

    For what neither sdpa nor an op for few queries gives: a prompt under attention sinks. Memory is that of one block.

    Args:
        q: queries `[B, Hq, S, D]`.
        k, v: `[B, Hkv, N, D]` and `[B, Hkv, N, Dv]`.
        scaling, softcap: as in `kernels.dense_attention`.
        mask: boolean `[B | 1, Hkv | 1, S, N]`, or None.
        is_causal: where no mask is given: whether the queries are the last `S` of `N` tokens and see nothing newer.

    Returns:
        The output `[B, Hq, S, Dv]` in the dtype of `q`, and the log-sum-exp of the scores `[B, Hq, S]`.
    """
    S, N = q.shape[2], k.shape[2]
    outs, lses = [], []
    for first in range(0, S, QUERY_BLOCK):
        at = slice(first, min(first + QUERY_BLOCK, S))
        hides_future = mask is None and is_causal
        n = N - S + at.stop if hides_future else N
        state = OnlineSoftmax(q[:, :, at], k.shape[1], scaling, softcap, v.shape[-1])
        for start in range(0, n, BLOCK):
            rows = slice(start, min(start + BLOCK, n))
            part = None if mask is None else mask[:, :, at, rows]
            if hides_future and rows.stop > N - S + first:
                where = torch.arange(rows.start, rows.stop, device=q.device)
                now = torch.arange(N - S + first, N - S + at.stop, device=q.device)
                part = (where <= now.unsqueeze(-1))[None, None]
            state.add(k[:, :, rows], v[:, :, rows], part)
        out, lse = state.result()
        outs.append(out)
        lses.append(lse)
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 2), torch.cat(lses, 2))
