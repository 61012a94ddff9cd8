"""Whether new rows go with those that a layer holds."""

from __future__ import annotations

import torch

from hf_kvcache.codecs.fitted import refit

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def in_one_dtype(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values in autocast's dtype, or in the wider one: autocast leaves keys in float32 after RoPE."""
    kind = k.device.type
    is_on = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if is_on else torch.promote_types(k.dtype, v.dtype)
    return k.to(dtype), v.to(dtype)


def check_rows(layer, k: torch.Tensor, v: torch.Tensor) -> None:
    """Refuse keys `[B, Hkv, S, D]` and values `[B, Hkv, S, Dv]` that a layer cannot append; the first ones shape it.

    Raises:
        ValueError: shapes, dtype, device or batch size differ from what the layer holds, or no rows are given.
    """
    where = f"layer {layer.layer_idx}"
    if k.dim() != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{where}: keys {list(k.shape)} and values {list(v.shape)} must be [B, Hkv, S, D]")
    if not k.shape[2]:
        raise ValueError(f"{where}: the input is empty; a forward pass needs at least one token")
    if k.dtype not in _DTYPES:
        raise ValueError(f"{where}: keys are {k.dtype}; a cache holds float16, bfloat16 or float32")
    if not layer.is_initialized:
        layer.lazy_initialization(k, v)
    if not layer.tokens_seen:
        layer.batch_size, layer.dtype, layer.device = k.shape[0], k.dtype, k.device
    found = {
        "batch size": (k.shape[0], layer.batch_size),
        "KV heads": (k.shape[1], layer.n_kv_heads),
        "head size": (k.shape[3], layer.head_dim),
        "head size of the values": (v.shape[3], layer.v_head_dim),
        "dtype": (k.dtype, layer.dtype),
        "device": (k.device, layer.device),
    }
    for what, (got, held) in found.items():
        if got != held:
            raise ValueError(
                f"{where}: {what} of the new tokens is {got}, of the cache {held}; "
                "use a new cache (or reset() this one) for another batch or model"
            )


def prepare_codecs(layer, k: torch.Tensor, v: torch.Tensor) -> dict:
    """The codecs of a layer's store for rows of these shapes, by "keys" and "values".

    Raises:
        ValueError: one cannot encode such rows.
    """
    fitting = {}
    for side, rows in (("keys", k), ("values", v)):
        codec, width = getattr(layer.store, side), rows.shape[3]
        if codec is None:
            continue
        try:
            codec.check(k.new_zeros(1, k.shape[1], layer.store.step, width))
        except (ValueError, StopIteration) as error:
            raise ValueError(f"{side} of layer {layer.layer_idx} cannot be encoded: {error}") from error
        fitting[side] = refit(codec, lambda part, width=width: part.for_shape(k.shape[1], width))
    return fitting
