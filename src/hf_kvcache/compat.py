"""Every question about other libraries' versions and internals, asked in one place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from inspect import signature

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

from hf_kvcache.rope import rotate

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
    "register_attention",
    "register_mask",
    "rope_kind",
    "rotary_parameters",
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


def rope_kind(module: torch.nn.Module) -> tuple:
    """What tells the rotary embeddings of a model's layers apart."""
    has_rope = bool(getattr(module, "use_rope", True))
    return type(module).__name__, _layer_type(module), has_rope, id(module.config)


def rotary_parameters(module: torch.nn.Module, head_dim: int) -> tuple[torch.Tensor, float] | None:
    """Angles per position `[R / 2]` and scaling of the model's own RoPE; None for a layer without.

    The embedding is built by the model's own class from its own config, and what the model's own function makes of a
    probe is compared with `rope.rotate`, so that an unknown layout cannot pass.

    Raises:
        ValueError: the embedding changes with the length of the text, or is not of the half-split kind.
    """
    if not getattr(module, "use_rope", True):
        return None
    name = type(module).__name__
    source = next((m for m in map(_module_of, type(module).__mro__) if hasattr(m, "apply_rotary_pos_emb")), None)
    kinds = [] if source is None else _rotary_classes(source)
    preferred = [kind for kind in kinds if kind.__name__ == name.replace("Attention", "RotaryEmbedding")]
    if not kinds or (len(kinds) > 1 and not preferred):
        raise ValueError(f'{name}: no rotary embedding was found beside it; LowRank(rope="post") does without')
    layer_type = _layer_type(module)
    rotary = (preferred or kinds)[0](config=module.config)
    is_by_type = hasattr(rotary, f"{layer_type}_inv_freq")
    kind = rotary.rope_type[layer_type] if is_by_type else rotary.rope_type
    if kind in ("dynamic", "longrope"):
        raise ValueError(
            f"{name}: {kind} RoPE changes its angles as the text grows, so keys cannot be taken back before it; "
            'LowRank(rope="post") does without'
        )
    prefix = f"{layer_type}_" if is_by_type else ""
    inv_freq, scaling = getattr(rotary, f"{prefix}inv_freq"), getattr(rotary, f"{prefix}attention_scaling")
    _probe(source, rotary, (layer_type,) if is_by_type else (), inv_freq, scaling, head_dim, name)
    return inv_freq, scaling


def _probe(source, rotary, extra, inv_freq, scaling, head_dim, name):
    x = torch.randn(1, 1, 3, head_dim, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 77]])
    cos, sin = rotary(x, positions, *extra)
    width = 2 * inv_freq.shape[0]
    # models that rotate some of the channels slice them off, here or in the attention itself
    theirs = source.apply_rotary_pos_emb(x[..., :width], x[..., :width], cos, sin)[1]
    angles = positions[..., None] * inv_freq
    ours = rotate(x[..., :width], angles.cos(), angles.sin()) * scaling
    if theirs.shape != ours.shape or (theirs - ours).abs().max() > 1e-4:
        raise ValueError(f'{name}: its RoPE does not pair channel i with i + R / 2; LowRank(rope="post") does without')


def _rotary_classes(source) -> list[type]:
    found = [value for name, value in vars(source).items() if name.endswith("RotaryEmbedding")]
    return [kind for kind in found if isinstance(kind, type) and issubclass(kind, torch.nn.Module)]


def _module_of(cls):
    return sys.modules.get(cls.__module__)


def _layer_type(module) -> str | None:
    layer_types = getattr(module.config, "layer_types", None)
    return layer_types[module.layer_idx] if layer_types else None
