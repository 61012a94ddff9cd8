"""Padding: what masks say of it, and what layers that evict note."""

from __future__ import annotations

import torch

from hf_kvcache.attention.mask import KVMask, as_boolean


def new_token_padding(mask, n_new: int, tokens_seen: int) -> torch.Tensor | None:
    """Which of the new tokens are real, boolean `[B, S]`; None when all are.

    In a mask of four dimensions a token is padding when no query of its own call sees it.
    """
    if mask is not None and not isinstance(mask, (KVMask, torch.Tensor)):
        raise ValueError(
            f"a {type(mask).__name__} does not say which tokens are padding, which this cache needs to know; "
            'load the model with attn_implementation="hf_kvcache"'
        )
    if isinstance(mask, KVMask):
        return None if mask.padding is None else mask.padding[:, tokens_seen - n_new : tokens_seen]
    if mask is not None and mask.dim() == 2:
        # flash attention gets the padding itself
        return mask[:, -n_new:].bool()
    if mask is None:
        return None
    return as_boolean(mask[..., -n_new:]).any(1).any(1)


def real_before(mask, n_new: int, tokens_seen: int) -> torch.Tensor | None:
    """How many real tokens stand before each of the new ones, int64 `[B, S]`; None where no padding is known of."""
    padding = mask.padding if isinstance(mask, KVMask) else None
    if padding is None:
        return None
    return (padding[:, :tokens_seen].long().cumsum(-1) - 1).clamp(min=0)[:, -n_new:]


def note_padding(layer, call) -> None:
    """Mark new rows that are padding, so that they are neither seen nor kept."""
    # without padding so far, a single new token is none: a row has at least one token per call
    if call.n_new == 1 and not layer.has_padding and layer.tokens_seen > 1:
        return
    is_real = call.is_real
    if is_real is not None and not is_real.all():
        layer.has_padding = True
        rows = layer.store.dense["position"][:, :, -call.n_new :]
        rows.masked_fill_(~is_real.unsqueeze(1), -1)
