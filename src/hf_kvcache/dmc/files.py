"""Retrofitted models as folders that transformers loads, and that the Hub takes as they are.

    config.json           the base model's, `model_type` and `auto_map` of ours, `kv_dmc` (`Settings`), `kv_dmc_facts`
    model.safetensors     all weights, those of "rows" and "linear" decisions among them
    modeling_kv_dmc.py    lets `from_pretrained(..., trust_remote_code=True)` find the classes

The model type is none of transformers' own: where nobody knows it, loading fails, and never yields the base model.
"""

from __future__ import annotations

import copy
import json
import os

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.dmc.classes import classes_of, read_settings, register
from hf_kvcache.dmc.settings import Settings
from hf_kvcache.dmc.training import common_settings

_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def save(model: torch.nn.Module, directory: str | os.PathLike, tokenizer=None, **facts) -> None:
    """Write a retrofitted model, whole; `load` and `AutoModelForCausalLM` read it.

    Args:
        model: a causal language model of transformers after `retrofit`, without PEFT adapters.
        directory: created if need be.
        tokenizer: saved beside it.
        facts: what else the config shall say, as JSON: `target_ratio=4.0, achieved_ratio=3.7, tokens_seen=10_000_000`.

    Raises:
        AdapterError: the model is not retrofitted, in parts only, or has adapters.
    """
    if hasattr(model, "peft_config") or any(hasattr(m, "adapter_layer_names") for m in model.modules()):
        raise AdapterError(
            "the model has PEFT adapters, which a whole model does not hold: merge them first (merge_and_unload), or "
            "save them as adapters"
        )
    settings = common_settings(model)
    base_model_type = getattr(model.config, "base_model_type", model.config.model_type)
    classes = classes_of(settings.method, base_model_type)
    if type(model) not in (classes.causal_lm, classes.causal_lm.__bases__[1]):
        raise AdapterError(
            f"{type(model).__name__} is not what AutoModelForCausalLM makes of {base_model_type!r}, so it would load "
            "as something else"
        )
    # the weights are shared: only what speaks of the model differs
    whole = copy.copy(model)
    whole.__class__ = classes.causal_lm
    whole.config = _config(model, classes.config, settings, facts)
    whole.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def load(source: str | os.PathLike, **kwargs) -> torch.nn.Module:
    """A retrofitted model from a folder or the Hub; its repository's code is not run.

    From here on `AutoModelForCausalLM.from_pretrained` knows models of this kind, too.

    Args:
        source: folder, or Hub repository ("name/repo").
        kwargs: of `AutoModelForCausalLM.from_pretrained`: `dtype`, `attn_implementation`, `revision`, ...

    Raises:
        AdapterError: it is no retrofitted model, or its settings are damaged.
    """
    if not make_known(source, **{k: v for k, v in kwargs.items() if k in _HUB}):
        raise AdapterError(f"{source} holds no retrofitted model: its config has no kv_dmc")
    return AutoModelForCausalLM.from_pretrained(source, **kwargs)


def make_known(source: str | os.PathLike, **hub) -> bool:
    """Let the Auto classes of transformers load a retrofitted model; whether it is one.

    Args:
        source: folder, or Hub repository.
        hub: `revision`, `token`, `subfolder` and the like.

    Raises:
        AdapterError: its settings are damaged.
    """
    config, _ = PreTrainedConfig.get_config_dict(source, **hub)
    model_type = config.get("model_type")
    if "kv_dmc" not in config or not isinstance(model_type, str):
        return False
    register(read_settings(config).method, model_type.partition("_")[2])
    return True


def _config(model: torch.nn.Module, cls: type, settings: Settings, facts: dict):
    from hf_kvcache import __version__

    known = getattr(model.config, "kv_dmc_facts", None) or {}
    facts = known | facts | {"digest": settings.digest, "hf_kvcache_version": __version__}
    try:
        json.dumps(facts)
    except TypeError as error:
        raise AdapterError(f"facts are saved as JSON: {error}") from error
    values = model.config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "transformers_version", "kv_dmc", "kv_dmc_facts"):
        values.pop(name, None)
    config = cls(**values, kv_dmc=settings.to_dict(), kv_dmc_facts=facts)
    config._attn_implementation = model.config._attn_implementation
    return config
