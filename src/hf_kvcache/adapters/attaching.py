"""One `attach` for every kind of adapter."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from importlib import import_module

import torch

from hf_kvcache.adapters.dmc_files import RETROFIT
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.files import CONFIG, Place, find, read_config
from hf_kvcache.adapters.in_memory import Adapter
from hf_kvcache.adapters.kinds import Kind
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
    _put(model.get_base_model() if hasattr(model, "get_base_model") else model, config, tensors, name, trainable)


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
    from peft import inject_adapter_in_model

    if name in getattr(model, "peft_config", {}):
        raise AdapterError(f"the model has an adapter {name!r} already; give this one another name")
    trained = [(p, p.requires_grad) for p in model.parameters()]
    with warnings.catch_warnings():
        # PEFT wonders about a second method on the model, which is what this is for
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model, name)
    for parameter, requires_grad in trained:
        parameter.requires_grad = requires_grad
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
