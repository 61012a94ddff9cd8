"""Attention of the tokens of a prompt, or of a part of it, over dense rows that they see causally."""

from __future__ import annotations

import torch

from hf_kvcache.kernels import check_operands, select

__all__ = ["prompt_attention"]


def prompt_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scaling: float,
    is_real: torch.Tensor | None = None,
    softcap: float | None = None,
    own: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend causally from `S` tokens in a row, the last of `N` as a rule (FlashAttention-2, arXiv 2307.08691).

    Memory is that of a block of queries by a block of rows, and rows that no query of a block sees cost nothing.

    Args:
        q: queries `[B, Hq, S, D]`, float16, bfloat16, float32 or float64.
        k: keys `[B, Hkv, N, D]` in the dtype of `q`.
        v: values `[B, Hkv, N, Dv]`, likewise; their head size may be another.
        scaling: factor on the scores.
        is_real: False for padding, which nobody sees, boolean `[B, N]`; None where there is none.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2, section 2).
        own: which row is that of the first query's token, `N - S` as a rule; query `i` sees the rows up to `own + i`.
            Of a block of rows out of more it may be negative, or behind them all.

    Returns:
        The output `[B, Hq, S, Dv]` in the dtype of `q`, and the natural log-sum-exp of the scores, scaled and capped,
        `[B, Hq, S]` in float32 (float64 for float64 queries). A query that sees nothing gets zeros and `-inf`.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    check_operands(q, k, v, None)
    if own is None and q.shape[2] > k.shape[2]:
        raise ValueError(f"{q.shape[2]} queries are more than {k.shape[2]} tokens")
    wanted = (k.shape[0], k.shape[2])
    if is_real is not None and (is_real.dtype != torch.bool or is_real.shape != wanted):
        raise ValueError(f"is_real {is_real.dtype} {list(is_real.shape)} must be bool {list(wanted)}")
    run = select("prompt_attention", q.device, (q, v))
    return run(q, k, v, scaling=scaling, is_real=is_real, softcap=softcap, own=own)
