"""The decision of every token, the same for training and inference."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hf_kvcache.dmc.settings import Settings
from hf_kvcache.shards import WHOLE, Shard

EPSILON = 2.0**-7  # no token weighs nothing: the step of bfloat16, as in the released code


def precise(x: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


def decide(
    settings: Settings, decision: torch.Tensor, importance: torch.Tensor | None = None, shard: Shard = WHOLE
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits of the decisions, and how much tokens weigh in a mean (DMC, arXiv 2403.09636).

    A positive logit says: the row of the token before is not to outlive this token (DMC: this one is merged into it).
    Values are taken as the model computed them, so that training, prefill and decoding agree.

    Args:
        settings: offset, scale, and whether heads decide alone.
        decision: raw values of the deciding channel, `[B, Hkv, S]`.
        importance: raw values of the weighing channel, `[B, Hkv, S]`, the mean over the query heads of a group; None
            for DMS.
        shard: which of the model's KV heads these are.

    Returns:
        Logits, float32 `[B, Hkv, S]`, and weights, float32 `[B, Hkv, S]` in `(0, 1 + 2^-7)`, or None.
    """
    logits = settings.scale * precise(decision) - settings.offset
    if settings.per == "layer":
        logits = shard.mean(logits.mean(1, keepdim=True)).expand_as(logits)
    if importance is None:
        return logits, None
    return logits, torch.sigmoid(precise(importance) + settings.offset) + EPSILON


def relax(logits: torch.Tensor, noise: torch.Tensor | None, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of the relaxed decisions of training, and the log of what they leave of the row before.

    Args:
        logits: `[B, Hkv, S]`.
        noise: logistic noise of the same shape, the difference of two Gumbel draws; None for none.
        tau: temperature.

    Returns:
        `p` and `log(1 - p)`, each `[B, Hkv, S]`.
    """
    a = (logits if noise is None else logits + noise) / tau
    return torch.sigmoid(a), F.logsigmoid(-a)


def logistic_noise(shape, generator: torch.Generator, device=None) -> torch.Tensor:
    """The difference of two Gumbel draws, float32."""
    u = torch.rand(shape, generator=generator, device=generator.device).clamp_(1e-7, 1 - 1e-7)
    return torch.logit(u).to(device or generator.device)


def harden(logits: torch.Tensor, opening: torch.Tensor | None = None) -> torch.Tensor:
    """The decisions of inference, boolean `[B, Hkv, S]`.

    Args:
        logits: `[B, Hkv, S]`.
        opening: from `opens`: tokens that have nothing before them; None when all have.
    """
    alpha = logits > 0
    return alpha if opening is None else alpha & ~opening


def opens(logits: torch.Tensor, is_real: torch.Tensor | None, has_begun: torch.Tensor | None) -> torch.Tensor:
    """Tokens that have nothing before them: the first real one, and padding; boolean `[B, 1, S]`.

    Args:
        logits: `[B, Hkv, S]`.
        is_real: which tokens are no padding, `[B, S]`; None when all are.
        has_begun: rows that have seen a real token before, `[B]`; None when none has.
    """
    B, _, S = logits.shape
    if is_real is None:
        is_real = torch.ones(B, S, dtype=torch.bool, device=logits.device)
    is_first = is_real & (is_real.cumsum(-1) == 1)
    if has_begun is not None:
        is_first = is_first & ~has_begun.unsqueeze(-1)
    return (is_first | ~is_real).unsqueeze(1)
