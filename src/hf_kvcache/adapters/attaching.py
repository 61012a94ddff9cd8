"""One `attach` for every kind of adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module

import torch

from hf_kvcache.adapters.dmc_files import RETROFIT
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.files import CONFIG, Place, find, read_config
from hf_kvcache.adapters.in_memory import Adapter
from hf_kvcache.adapters.kinds import Kind
from hf_kvcache.adapters.lora import inject, trained_with
from hf_kvcache.adapters.lowrank_files import LOWRANK
from hf_kvcache.adapters.modules import attentions
from hf_kvcache.adapters.retaining_files import RETAINING

KINDS = {kind.peft_type: kind for kind in (LOWRANK, RETAINING, RETROFIT)}


def attach(
    model: torch.nn.Module,
    adapter: Adapter | str | os.PathLike,
    name: str = "default",
    trainable: bool = False,
    **hub,
) -> None:
    """Put an adapter on a model, for caches to find: what `model.load_adapter(directory, name)` would do.

    What the model computes stays as it is, but under a retrofit (DMC, DMS), which merges or drops tokens from now on.
    LoRA that a retrofit was trained with is loaded, too, as an adapter called `<name>-lora`.
    Which of its other parameters are trained stays as it is, too.

    Args:
        model: a transformers model, or one that PEFT has wrapped.
        adapter: bases or retaining heads, checked against the model and copied; or the folder or Hub repository to
            load them, or a retrofit, from.
        name: of the adapter; another than those of the adapters that are there.
        trainable: whether its parameters are; not those of bases, which no forward pass uses.
        hub: `revision`, `token`, `subfolder` and the like for the Hub.

    Raises:
        AdapterError: the adapter cannot be loaded, does not fit, or the name is taken.
        ImportError: PEFT is not installed.
        TypeError: an argument is none of these.
    """
    kind = adapter.kind if isinstance(adapter, Adapter) else kind_of(adapter, **hub)
    if trainable and not kind.is_trained:
        raise TypeError(f"trainable=True: {kind.title} has no parameters that a forward pass would use")
    # imports PEFT, or says what is wrong with it
    config_cls = getattr(import_module("hf_kvcache.adapters"), kind.config_name)
    if isinstance(adapter, Adapter):
        config, tensors = adapter.config(), adapter.tensors
    else:
        config, tensors = kind.read(adapter, **hub)
    names = *kind.fields, "base_model_name_or_path", "fingerprint", "hf_kvcache_version"
    own = {key: config[key] for key in names if key in config}
    config = config_cls(task_type="CAUSAL_LM", inference_mode=True, **own)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(config, "lora", None) is None:
        _put(model, config, tensors, name, trainable)
        return
    inner = "/".join(filter(None, [hub.get("subfolder"), config.lora]))
    with trained_with(model, adapter, hub | {"subfolder": inner}, f"{name}-lora", trainable):
        _put(model, config, tensors, name, trainable)


def kind_of(source: str | os.PathLike, **hub) -> Kind:
    """Of which kind the adapter in a folder or on the Hub is; arguments and errors as `Kind.read`."""
    peft_type = read_config(*find(source, (CONFIG,), hub)).get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in KINDS:
        *others, last = map(repr, KINDS)
        ours = f"{', '.join(others)} or {last}"
        raise AdapterError(f"{source} is of peft_type {peft_type!r}; what caches look for is {ours}")
    return KINDS[peft_type]


def _put(model: torch.nn.Module, config, tensors: Mapping[Place, torch.Tensor], name: str, trainable: bool) -> None:
    """Put an adapter on a model, with a config of inference, so that no values are drawn; activate it."""
    if name in getattr(model, "peft_config", {}):
        raise AdapterError(f"the model has an adapter {name!r} already; give this one another name")
    inject(model, config, name)
    if trainable:
        config.inference_mode = False
        config.tie(model)
    found, child = attentions(model), config.kind.child
    layers = {i: getattr(found[i].module, child) for i in config.layer_indices()}
    for layer in layers.values():
        layer.set_adapter(name, inference_mode=not trainable)
    for (i, part), t in tensors.items():
        held = getattr(layers[i], f"{child}_{part}")
        held[name] = torch.nn.Parameter(t.detach().to(layers[i]._device, copy=True), requires_grad=trainable)
    # transformers' own adapter methods (set_adapter, disable_adapters, save_pretrained) ask for this
    model._hf_peft_config_loaded = True
