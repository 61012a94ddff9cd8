"""Which cache has handed out tensors in this thread that attention has not been called with yet."""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from typing import NamedTuple

import torch

# of the call, not of the model or the module: several threads may run one model
_LENDER: ContextVar[weakref.ref | None] = ContextVar("hf_kvcache_lender", default=None)


class Handed(NamedTuple):
    """Rows of a layer that a model has got as tensors.

    Attributes:
        layer_idx: of the layer.
        n_new: rows of the call.
        is_prefill: whether they are all there are.
    """

    layer_idx: int
    n_new: int
    is_prefill: bool


def note_lender(cache) -> None:
    """`cache` hands out tensors; its `handed` says of which layer."""
    _LENDER.set(weakref.ref(cache))


def handed_out(module: torch.nn.Module, key: torch.Tensor):
    """The cache out of whose rows `key` `[B, H, N, D]` has been made, or None."""
    lender = _LENDER.get()
    cache = None if lender is None else lender()
    if cache is None or cache.handed is None or cache.handed.layer_idx != getattr(module, "layer_idx", None):
        return None
    return cache if key.shape[-2] == cache.layers[cache.handed.layer_idx].store.n_kept else None
