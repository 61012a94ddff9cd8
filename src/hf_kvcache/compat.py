"""Every question about other libraries' versions and internals, asked in one place."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from inspect import signature, unwrap

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, GenerationMixin
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask
from transformers.utils import TransformersKwargs

__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "CacheLayerMixin",
    "LinearAttentionCacheLayerMixin",
    "LinearAttentionLayer",
    "attention_functions",
    "cache_argument",
    "causal_mask_function",
    "checkpointing",
    "drop_rows",
    "eager_attention",
    "eager_mask",
    "given_cache",
    "n_states",
    "named_cache",
    "leaves_cache_at",
    "register_attention",
    "register_mask",
    "sdpa_attention_forward",
    "sdpa_mask",
    "stock_layers",
]


# what attention functions are told and need not act on, or what masks say already
HARMLESS_ARGUMENTS = frozenset(TransformersKwargs.__annotations__) - {"output_attentions", "is_causal"} | {
    "cache_position",
    "sliding_window",
    "use_cache",
}
# what transformers' sdpa function acts on
SDPA_ARGUMENTS = frozenset(signature(sdpa_attention_forward).parameters)

# the name under which a cache travels through forward passes and `generate`, newest first: 5.24 renamed it
CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = next(
    name for name in CACHE_NAMES if name in signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


def cache_argument(cache) -> dict:
    """The keyword argument that hands `cache` to a model or to `generate`, under the name that this release has."""
    return {CACHE_NAME: cache}


def given_cache(arguments):
    """The cache among the arguments of a call, or the fields of a model's output, under either name; or None."""
    found = (arguments.get(name) for name in CACHE_NAMES)
    return next((cache for cache in found if cache is not None), None)


def named_cache(arguments: dict) -> dict:
    """The keyword arguments of a call, with its cache under the name that this release has, whichever it came under.

    Given both, the newest name counts, as in transformers, and a warning says so.
    """
    given = [name for name in CACHE_NAMES if name in arguments]
    if given in ([], [CACHE_NAME]):
        return arguments
    if any(arguments[name] is not None for name in given[1:]):
        warnings.warn(f"{' and '.join(given)} are one argument: {given[0]} is used", stacklevel=3)
    rest = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    return rest | cache_argument(arguments[given[0]])


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


def checkpointing(is_on: bool) -> dict:
    """Arguments of `TrainingArguments` that let activations be recomputed, never reentrantly; 5.23 has renamed them."""
    from transformers import TrainingArguments

    names = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    # reentrant checkpointing would cut decisions off from their gradient
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if is_on else {}


def leaves_cache_at(module: torch.nn.Module) -> int | None:
    """Tokens after which `generate` drops the cache it was given, for the model of an attention module; None for never.

    Models whose longrope has other factors for long texts (Phi-3, Phi-3.5-MoE, Phi-4-multimodal) encode the text again
    at that length, in a cache of transformers' own. Their `prepare_inputs_for_generation` says so.
    """
    name, config = "original_max_position_embeddings", module.config
    length = getattr(config, name, None)
    if not length or getattr(config, "max_position_embeddings", length) <= length:
        return None
    kinds = [kind for kind in vars(sys.modules[type(module).__module__]).values() if isinstance(kind, type)]
    methods = [vars(kind).get("prepare_inputs_for_generation") for kind in kinds]
    switches = any(name in unwrap(method).__code__.co_names for method in methods if method is not None)
    return length if switches else None


def stock_layers(config) -> list[CacheLayerMixin | None]:
    """transformers' own cache layer for every layer of a model, None where it has the rows of full attention."""
    layers = DynamicCache(config=config).layers
    return [None if type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer) else layer for layer in layers]


def n_states(config) -> dict[int, int]:
    """Layers that have full attention and linear attention beside it: how many states, by index."""
    layers = enumerate(DynamicCache(config=config).layers)
    return {i: layer.number_of_states for i, layer in layers if type(layer) is LinearAttentionAndFullAttentionLayer}


def stock_nbytes(layer: CacheLayerMixin) -> int:
    """Bytes of what one of transformers' own cache layers holds itself, by unique storages."""
    storages = {}
    for value in vars(layer).values():
        held = list(value.values()) if isinstance(value, dict) else value
        for tensor in held if isinstance(held, (list, tuple)) else [held]:
            if isinstance(tensor, torch.Tensor):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())
