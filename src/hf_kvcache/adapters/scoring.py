"""What retaining heads compute, for trained and untrained ones alike (Locret, arXiv 2410.01805)."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from hf_kvcache.adapters.errors import AdapterError

# a dictionary rather than functools.cache, which torch.compile looks through
_ACTIVATIONS: dict[str, torch.nn.Module] = {}
_BLOCK = 4096  # tokens whose features are in memory at once


def score(features: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """`fc2(act(fc1(features)))`: how much later tokens will look at every token, by KV head (Locret).

    The first product runs in the dtype of the features, everything after it in float32.

    Args:
        features (torch.Tensor):
            queries, keys and values before RoPE, `[B, S, F]`.
        fc1 (torch.Tensor):
            `[d_r, F]`.
        fc2 (torch.Tensor):
            `[Hkv, d_r]`.
        activation (str):
            its name in `transformers.activations.ACT2FN`.

    Returns:
        Scores, float32 `[B, Hkv, S]`.
    """
    fc1, fc2 = fc1.to(features), fc2.to(features.device, torch.float32)
    hidden = activation_of(activation)(linear(features, fc1).float())  # [B, S, d_r]
    # autocast would round the scores, and rounded scores tie
    with torch.autocast(features.device.type, enabled=False):
        return linear(hidden.float(), fc2).transpose(1, 2)


def score_in_blocks(parts: list[torch.Tensor], fc1: torch.Tensor, fc2: torch.Tensor, activation: str) -> torch.Tensor:
    """`score` of features that come in parts, each `[B, S, ...]`: some tokens at a time are put together."""
    # cast once, not for every block
    fc1 = fc1.to(parts[0])
    blocks = zip(*(part.split(_BLOCK, 1) for part in parts))
    found = [score(torch.cat(block, -1), fc1, fc2, activation) for block in blocks]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def activation_of(name: str) -> torch.nn.Module:
    """An activation of transformers by its name.

    Raises:
        AdapterError: there is none, or it has parameters of its own.
    """
    if name in _ACTIVATIONS:
        return _ACTIVATIONS[name]
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise AdapterError(f"activation={name!r} is none that transformers has")
    found = ACT2FN[name]
    if any(True for _ in found.parameters()):
        raise AdapterError(f"activation={name!r} has parameters of its own")
    _ACTIVATIONS[name] = found.eval()
    return found
