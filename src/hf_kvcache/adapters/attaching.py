"""One `attach` for every kind of adapter."""

from __future__ import annotations

import os

import torch

from hf_kvcache.adapters import dmc_files, files, layout, retaining_files
from hf_kvcache.adapters.bases import Bases
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.retaining import RetainingHeads


def attach(model: torch.nn.Module, adapter: Bases | RetainingHeads | str | os.PathLike, name: str = "default", **more):
    """Put an adapter on a model, for caches to find.

    What the model computes stays as it is, but under a retrofit (DMC, DMS), which merges or drops tokens from now on.

    Args:
        model: a transformers model, or one that PEFT has wrapped.
        adapter: bases or retaining heads, checked against the model; or the folder or Hub repository to load them, or
            a retrofit, from.
        name: of the adapter; another than those of the adapters that are there.
        more: `revision`, `token`, `subfolder` and the like for the Hub; `trainable=True` for heads or a retrofit.

    Raises:
        AdapterError: the adapter cannot be loaded, does not fit, or the name is taken.
        ImportError: PEFT is not installed.
    """
    if isinstance(adapter, Bases):
        kind = layout.PEFT_TYPE
    elif isinstance(adapter, RetainingHeads):
        kind = retaining_files.PEFT_TYPE
    else:
        kind = files.peft_type_of(adapter, **{key: value for key, value in more.items() if key != "trainable"})
    if kind == layout.PEFT_TYPE:
        from hf_kvcache.adapters.lowrank import attach as put
    elif kind == retaining_files.PEFT_TYPE:
        from hf_kvcache.adapters.retaining_peft import attach as put
    elif kind == dmc_files.PEFT_TYPE:
        from hf_kvcache.adapters.dmc_peft import attach as put
    else:
        ours = f"{layout.PEFT_TYPE!r}, {retaining_files.PEFT_TYPE!r} or {dmc_files.PEFT_TYPE!r}"
        raise AdapterError(f"{adapter} is of peft_type {kind!r}; what caches look for is {ours}")
    put(model, adapter, name, **more)
