"""Every question about other libraries' versions and internals, asked in one place."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = [
    "CacheLayerMixin",
    "attention_functions",
    "drop_rows",
    "eager_attention",
    "register_attention",
    "register_mask",
    "sdpa_attention_forward",
    "sdpa_mask",
    "stock_layers",
]


def eager_attention(module: torch.nn.Module) -> Callable:
    """The model's own eager attention function: the one beside the attention class or one of its bases."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise NotImplementedError(f"{type(module).__name__} has no eager attention; load the model with another one")


def attention_functions() -> dict[str, Callable]:
    """The attention functions of the public registry by name, without those that bring their own paged cache."""
    registry = AttentionInterface()
    return {name: registry[name] for name in registry.valid_keys() if not name.startswith("paged|")}


def register_attention(name: str, function: Callable) -> None:
    AttentionInterface.register(name, function)


def register_mask(name: str, function: Callable) -> None:
    AttentionMaskInterface.register(name, function)


def drop_rows(layer) -> None:
    """Finish the `reset()` of transformers' own layer: 5.17 zeroes the rows, newer releases drop them."""
    if isinstance(layer, DynamicLayer) and layer.is_initialized:
        layer.keys = layer.values = None
        layer.is_initialized = False


def stock_layers(config) -> list[CacheLayerMixin | None]:
    """transformers' own cache layer for every layer of a model, None where it is plain full attention."""
    layers = DynamicCache(config=config).layers
    return [None if type(layer) is DynamicLayer else layer for layer in layers]
