"""Which modules of an attention module produce its queries, keys and values."""

from __future__ import annotations

from torch import nn

from hf_kvcache.adapters.errors import AdapterError

FEATURE_POINTS = ("projection", "norm")


def has_norms(attention: nn.Module) -> bool:
    """Whether queries and keys are normalised by modules of their own before RoPE."""
    return all(getattr(attention, name, None) is not None for name in ("q_norm", "k_norm"))


def sources(attention: nn.Module, feature_point: str) -> dict[str, str]:
    """Names of the modules of an attention module that produce queries, keys and values, by "q", "k", "v" or "qkv".

    Raises:
        AdapterError: names those that the attention module lacks.
    """
    if getattr(attention, "qkv_proj", None) is not None:
        names = {"qkv": "qkv_proj"}
    else:
        names = {role: f"{role}_proj" for role in "qkv"}
    if feature_point == "norm":
        names |= {"q": "q_norm", "k": "k_norm"}
    missing = [name for name in names.values() if getattr(attention, name, None) is None]
    if missing:
        layer = f"{type(attention).__name__} of layer {getattr(attention, 'layer_idx', '?')}"
        raise AdapterError(f"{layer} has no {', '.join(missing)}, whose outputs retaining heads look at")
    return names
