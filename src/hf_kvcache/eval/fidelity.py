"""How far a model behind a compressed cache is from the dense model.

The context is prefilled, so the cache compresses it; the text that follows is then fed through that cache, and every
prediction is compared with the dense model's. The prefill's own prediction is left out: it is exact by construction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from hf_kvcache.compat import cache_argument
from hf_kvcache.long_prompts import begin


@dataclass(frozen=True)
class Fidelity:
    """Scores over all predictions made through the cache.

    Attributes:
        perplexity: of the text that follows, per token.
        kl: mean KL(dense model || model behind the cache), in nats per token.
    """

    perplexity: float
    kl: float


def build_windows(ids: torch.Tensor, n_context: int, n_next: int, n_windows: int, bos: int | None) -> torch.Tensor:
    """Windows `[B, n_context + n_next]` spread over a text `[n]`, `B <= n_windows`; no token is predicted twice.

    Raises:
        ValueError: the text is shorter than one window.
    """
    head = [] if bos is None else [bos]
    n_text = n_context + n_next - len(head)
    surplus = len(ids) - n_text
    if surplus < 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, one window of context and continuation needs {n_text}; "
            "give a longer text or a shorter context"
        )
    n_windows = min(n_windows, surplus // n_next + 1)
    starts = torch.linspace(0, surplus, n_windows).long() if n_windows > 1 else [0]
    return torch.stack([torch.cat([ids.new_tensor(head), ids[start : start + n_text]]) for start in starts])


@torch.no_grad()
def dense_logits(model, windows: torch.Tensor, n_context: int) -> torch.Tensor:
    """Logits of the model without any cache for the tokens after the context, `[B, n_next - 1, vocab]`."""
    n_next = windows.shape[1] - n_context
    rows = [model(row[None], use_cache=False, logits_to_keep=n_next).logits[:, :-1] for row in windows]
    return torch.cat(rows)


@torch.no_grad()
def fidelity(
    model, windows: torch.Tensor, n_context: int, dense: torch.Tensor, make_cache: Callable, step: int = 8
) -> Fidelity:
    """Compare predictions through a cache with the dense model's.

    Args:
        model: causal language model.
        windows: token ids, `[B, n_context + n_next]`.
        n_context: tokens that are prefilled and compressed.
        dense: what `dense_logits` returned, `[B, n_next - 1, vocab]`.
        make_cache: returns a new cache.
        step: tokens fed at a time.
    """
    cache = make_cache()
    model(begin(model, windows[:, :n_context], cache), **cache_argument(cache), use_cache=True, logits_to_keep=1)
    n_predicted = dense.shape[1]
    loss = divergence = 0.0
    for start in range(0, n_predicted, step):
        stop = min(start + step, n_predicted)
        fed = windows[:, n_context + start : n_context + stop]
        target = windows[:, n_context + start + 1 : n_context + stop + 1]
        logits = model(fed, **cache_argument(cache), use_cache=True).logits.float()  # [B, step, vocab]
        loss += cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
        expected = log_softmax(dense[:, start:stop].float(), -1)
        divergence += kl_div(log_softmax(logits, -1), expected, reduction="sum", log_target=True).item()
    n = windows.shape[0] * n_predicted
    # rounding can take a sum of zeros below zero
    return Fidelity(perplexity=math.exp(loss / n), kl=max(divergence / n, 0.0))
