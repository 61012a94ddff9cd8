"""The relaxed attention of training without a bias of `T * T`: FlexAttention, on GPUs."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

MIN_TOKENS = 128  # a block of FlexAttention; shorter texts are as well off without


def can_attend(q: torch.Tensor, dropout: float) -> bool:
    """Whether a call can go this way: FlexAttention has no backward pass on CPUs, and no dropout."""
    return q.is_cuda and q.shape[2] >= MIN_TOKENS and not dropout and q.dtype != torch.float64


def attend_flex(q, k, v, left, is_real, delay, *, scaling, softcap=None, run=None) -> torch.Tensor:
    """What `attention.attend_parallel` computes for relaxed decisions, from one number per key.

    Args:
        q: `[B, Hq, T, D]`.
        k, v: `[B, Hkv, T, D]`.
        left: `log(1 - p)` `[B, Hkv, T]`, whose gradient FlexAttention returns.
        is_real: which tokens are no padding, `[B, T]`; None when all are.
        delay: tokens for which a key stays.
        scaling, softcap: of the scores.
        run: the attention function; compiled FlexAttention unless told.

    Returns:
        `[B, Hq, T, D]`.
    """
    groups = q.shape[1] // k.shape[1]
    of_key = torch.nn.functional.pad(left[..., 1:], (0, 1)).contiguous()

    def hide(score, b, h, i, t):
        score = score if softcap is None else softcap * torch.tanh(score / softcap)
        return torch.where(i - t > delay, score + of_key[b, h // groups, t], score)

    run = _compiled() if run is None else run
    mask = _block_mask(q, is_real)
    return run(q, k, v, score_mod=hide, block_mask=mask, scale=scaling, enable_gqa=groups > 1)


def _block_mask(q, is_real):
    if is_real is None:
        return _causal_blocks(q.shape[2], str(q.device))

    def sees(b, h, i, t):
        # a padded query sees itself, so that its row is a number
        return (i >= t) & (is_real[b, t] | (i == t))

    return create_block_mask(sees, q.shape[0], None, q.shape[2], q.shape[2], device=q.device)


@cache
def _causal_blocks(n_tokens: int, device: str):
    return create_block_mask(lambda b, h, i, t: i >= t, None, None, n_tokens, n_tokens, device=device)


@cache
def _compiled():
    return torch.compile(flex_attention, dynamic=False)
