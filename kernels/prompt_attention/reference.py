"""The definition of `prompt_attention`, in plain PyTorch: blocks of queries over blocks of rows."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.online_softmax import OnlineSoftmax

QUERIES, ROWS = 256, 1024


def unavailable(device) -> None:
    return None


def prompt_attention(q, k, v, *, scaling, is_real=None, softcap=None, own=None):
    S, N = q.shape[2], k.shape[2]
    own = N - S if own is None else own
    outs, lses = [], []
    for first in range(0, S, QUERIES):
        at = slice(first, min(first + QUERIES, S))
        newest = torch.arange(own + at.start, own + at.stop, device=q.device).unsqueeze(1)
        state = OnlineSoftmax(q[:, :, at], k.shape[1], scaling, softcap, v.shape[-1])
        for start in range(0, max(min(own + at.stop, N), 1), ROWS):
            rows = slice(start, min(start + ROWS, N))
            sees = (torch.arange(rows.start, rows.stop, device=q.device) <= newest)[None, None]
            state.add(k[:, :, rows], v[:, :, rows], sees if is_real is None else sees & is_real[:, None, None, rows])
        out, lse = state.result()
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)
