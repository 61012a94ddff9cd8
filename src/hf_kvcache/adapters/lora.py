"""LoRA that an adapter of ours was trained with: put on a model beside it, or not at all."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.files import CONFIG, ROOT, TENSORS, find

# what a config can ask for that has weights beside those of LoRA
OTHER_WEIGHTS = "modules_to_save", "trainable_token_indices", "target_parameters"


def inject(model: torch.nn.Module, config, name: str) -> None:
    """PEFT's `inject_adapter_in_model`, after which the parameters that were there are trained or not as before."""
    from peft import inject_adapter_in_model

    trained = [(p, p.requires_grad) for p in model.parameters()]
    with warnings.catch_warnings():
        # PEFT wonders about a second method on the model, which is what this is for
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model, name)
    for parameter, requires_grad in trained:
        parameter.requires_grad = requires_grad


@contextmanager
def trained_with(model: torch.nn.Module, source: str | os.PathLike, hub: Mapping, name: str, trainable: bool):
    """Put LoRA on a model; take it off again if what is done within fails.

    transformers' `load_adapter` would write tensors of other names into the base model.

    Args:
        model: a transformers model.
        source, hub: where the files are; see `find`.
        name: of the adapter.
        trainable: whether its parameters are.

    Raises:
        AdapterError: there is no LoRA, it does not fit, or the name is taken.
    """
    config, tensors = _read(find(source, (CONFIG, TENSORS), hub))
    if name in getattr(model, "peft_config", {}):
        raise AdapterError(f"the model has an adapter {name!r} already; give what is trained with it another name")
    config.inference_mode = not trainable
    try:
        try:
            inject(model, config, name)
        except (ValueError, TypeError) as error:
            raise AdapterError(f"the LoRA does not fit the model: {error}") from error
        _fill(model, tensors, name, trainable)
        yield
    except BaseException:
        _take_off(model, name)
        raise


def _read(files: tuple[Path, Path]):
    """The config, and tensors by name."""
    from peft import LoraConfig, PeftConfig

    path, weights = files
    try:
        config, tensors = PeftConfig.from_pretrained(str(path.parent)), load_file(weights)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterError(f"{path.parent} holds no LoRA that could be read: {error}") from error
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"{path.parent} is of peft_type {config.peft_type}, and LoRA was expected")
    odd = [key for key in OTHER_WEIGHTS if getattr(config, key, None)]
    odd += ["bias"] * (config.bias != "none") + ["init_lora_weights"] * (config.init_lora_weights not in (True, False))
    if odd:
        raise AdapterError(f"{path}: {', '.join(odd)} would change weights of the model itself")
    if wrong := [name for name, t in tensors.items() if not t.isfinite().all()]:
        raise AdapterError(f"{weights}: NaN or infinity in {', '.join(wrong[:3])}")
    return config, {name.removeprefix(ROOT): t for name, t in tensors.items()}


def _fill(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], name: str, trainable: bool) -> None:
    """Copy tensors to the parameters of one LoRA, all of which they have to be."""
    middle = f".{name}."
    held = {key.replace(middle, "."): p for key, p in model.named_parameters() if middle in key}
    if odd := sorted(held.keys() ^ tensors.keys()):
        raise AdapterError(f"the LoRA and the model differ in {', '.join(odd[:3])}, {len(odd)} tensors in all")
    if odd := [key for key, t in tensors.items() if held[key].shape != t.shape]:
        raise AdapterError(f"the LoRA and the model differ in the shapes of {', '.join(odd[:3])}")
    with torch.no_grad():
        for key, t in tensors.items():
            held[key].copy_(t)
            held[key].requires_grad_(trainable)
    model._hf_peft_config_loaded = True


def _take_off(model: torch.nn.Module, name: str) -> None:
    """Leave nothing of a LoRA, of which all or a part is there, and what it alone had wrapped as it was."""
    from peft.tuners.lora import LoraLayer

    for path, layer in [(path, layer) for path, layer in model.named_modules() if isinstance(layer, LoraLayer)]:
        if name in layer.lora_A:
            layer.delete_adapter(name)
            if not layer.lora_A:
                model.set_submodule(path, layer.get_base_layer())
    left = getattr(model, "peft_config", {})
    left.pop(name, None)
    model._hf_peft_config_loaded = bool(left)
    if not left and "peft_config" in vars(model):
        del model.peft_config
