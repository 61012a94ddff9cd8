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
    "DynamicLayer",
    "LinearAttentionCacheLayerMixin",
    "LinearAttentionLayer",
    "attention_functions",
    "cache_argument",
    "causal_mask_function",
    "checkpointing",
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
    "hf_layers",
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
    """The model's own eager attention function: the one that its class names, or that stands beside a base of it."""
    for cls in type(module).__mro__:
        beside = vars(sys.modules[cls.__module__]) if cls.__module__ in sys.modules else {}
        code = getattr(unwrap(vars(cls)["forward"]), "__code__", None) if "forward" in vars(cls) else None
        # a file with several kinds of attention has several such functions
        for name in (*(() if code is None else code.co_names), "eager_attention_forward"):
            if name.endswith("eager_attention_forward") and name in beside:
                return beside[name]
    raise NotImplementedError(f"{type(module).__name__} has no eager attention; load the model with another one")


def collects_attentions() -> bool:
    """Whether the running forward pass was asked for attention weights, which it takes from modules by hooks."""
    # a private name: where it is gone, only models that say so to their attention get weights
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    return collector is not None and any("attentions" in name for name in collector.get() or ())


def attention_functions() -> dict[str, Callable]:
    """The attention functions of the public registry by name, without those that bring their own paged cache."""
    registry = AttentionInterface()
    return {name: registry[name] for name in registry.valid_keys() if not name.startswith("paged|")}


def register_attention(name: str, function: Callable) -> None:
    AttentionInterface.register(name, function)


def register_mask(name: str, function: Callable) -> None:
    AttentionMaskInterface.register(name, function)


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


def hf_layers(config) -> list[CacheLayerMixin | None]:
    """transformers' own cache layer for every layer of a model, None where it has the rows of full attention."""
    layers = DynamicCache(config=config).layers
    return [None if type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer) else layer for layer in layers]


def n_states(config) -> dict[int, int]:
    """Layers that have full attention and linear attention beside it: how many states, by index."""
    layers = enumerate(DynamicCache(config=config).layers)
    return {i: layer.number_of_states for i, layer in layers if type(layer) is LinearAttentionAndFullAttentionLayer}


def hf_nbytes(layer: CacheLayerMixin) -> int:
    """Bytes of what one of transformers' own cache layers holds itself, by unique storages."""
    storages = {}
    for value in vars(layer).values():
        held = list(value.values()) if isinstance(value, dict) else value
        for tensor in held if isinstance(held, (list, tuple)) else [held]:
            if isinstance(tensor, torch.Tensor):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())
