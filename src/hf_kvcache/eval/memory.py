"""Bytes that a cache holds, counted the same way for every class."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import Cache


def cache_nbytes(cache: Cache) -> int:
    """Bytes of the distinct storages behind a cache's layers, quantised tensors and their scales included."""
    storages = {}
    for layer in cache.layers:
        if hasattr(layer, "nbytes"):
            storages[id(layer)] = layer.nbytes
            continue
        for tensor in _tensors(vars(layer)):
            storage = tensor.untyped_storage()
            storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value) -> Iterator[torch.Tensor]:
    """Plain tensors inside containers and wrapper tensors."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name))
        else:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
