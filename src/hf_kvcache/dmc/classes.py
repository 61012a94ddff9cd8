"""Classes of retrofitted models: a base model of transformers that carries its settings, and takes our cache unasked.

Every architecture that `AutoModelForCausalLM` knows has them, made on demand: `DMCLlamaConfig`, `DMCLlamaModel` and
`DMCLlamaForCausalLM` of model type `dmc_llama`, and so on. The model type is their own, so that nothing takes their
folder for one of the base model.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.modules import RETROFIT_CHILD
from hf_kvcache.dmc.retrofitting import retrofit
from hf_kvcache.dmc.settings import DEFAULTS, Settings
from hf_kvcache.hub.modeling_mixin import TakesCache, either_name, with_cache
from hf_kvcache.hub.spec import cache_of

MODULE = "modeling_kv_dmc"  # of the file that a folder brings along
_CODE = '''"""Needs hf_kvcache (pip install hf_kvcache): {title} decides which tokens keep a row of its KV cache."""

from hf_kvcache.dmc.classes import {names}

__all__ = [{quoted}]
'''


class Classes(NamedTuple):
    """Of one method and architecture."""

    config: type
    model: type
    causal_lm: type


class _Config:
    """Mixed into the config of a base model.

    Attributes:
        kv_dmc: `Settings.to_dict()`.
        kv_dmc_facts: what is known of the retrofit; `digest` tells whether somebody has changed the settings since.
    """

    kv_dmc = None
    kv_dmc_facts = None

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        read_settings(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict:
        # what a repository adds to these names would not hold for the next one
        return super().to_dict() | {"auto_map": dict(type(self).auto_map)}

    def save_pretrained(self, save_directory, *args, **kwargs):
        # first, so that it is among what is pushed
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        names = [cls.__name__ for cls in classes_of(self.kv_dmc_method, self.base_model_type)]
        code = _CODE.format(
            title=names[-1], names=", ".join(names), quoted=", ".join(f'"{name}"' for name in sorted(names))
        )
        (Path(save_directory) / f"{MODULE}.py").write_text(code)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig") -> None:
        """Nothing: saving would copy this file instead of `modeling_kv_dmc.py`."""


class _Model(TakesCache):
    """Mixed into a base model: decides, and takes our cache where transformers would make one of its own."""

    def __init__(self, config, *args, **kwargs):
        settings = read_settings(config.to_dict())
        super().__init__(config, *args, **kwargs)
        retrofit(self, settings)

    @classmethod
    def from_pretrained(cls, source, *args, output_loading_info: bool = False, **kwargs):
        """Load as any model is loaded; weights that the settings speak of must be there, and no others of a retrofit.

        Raises:
            AdapterError: they are not.
        """
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        extra = [name for name in info["unexpected_keys"] if f".{RETROFIT_CHILD}." in name]
        for what, names in (("lacks", info["missing_keys"]), ("has, in spite of its settings,", extra)):
            if names:
                raise AdapterError(f"{source} {what} {len(names)} weights, such as {min(names)}: it is no whole model")
        return (model, info) if output_loading_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel") -> None:
        """Nothing, as in the config."""

    def new_cache(self):
        """The cache that goes with this model, empty: what an exported config says, or rows as they are."""
        from hf_kvcache.presets import DMCCache, DMSCache

        config = self.config.get_text_config(decoder=True)
        if getattr(self.config, "kv_cache", None) is not None:
            return cache_of(self.config.kv_cache, config=config)
        return {"dmc": DMCCache, "dms": DMSCache}[self.config.kv_dmc_method](config=config)


@functools.cache
def classes_of(method: str, base_model_type: str) -> Classes:
    """Config and models of a method ("dmc" or "dms") and an architecture of transformers ("llama").

    Raises:
        AdapterError: transformers has no such architecture, or no causal language model of it.
    """
    if method not in DEFAULTS or base_model_type not in CONFIG_MAPPING:
        raise AdapterError(f"there are no models for {method!r} on {base_model_type!r}, which transformers must know")
    base = CONFIG_MAPPING[base_model_type]
    mappings = AutoModel._model_mapping, AutoModelForCausalLM._model_mapping
    if not base.__module__.startswith("transformers.") or any(base not in mapping for mapping in mappings):
        raise AdapterError(f"transformers has no causal language model of type {base_model_type!r}")
    found = [mapping[base] for mapping in mappings]
    bases = [cls[0] if isinstance(cls, tuple) else cls for cls in found]
    model_type = f"{method}_{base_model_type}"
    names = [f"{method.upper()}{cls.__name__}" for cls in (base, *bases)]
    autos = "AutoConfig", "AutoModel", "AutoModelForCausalLM"
    body = {
        "model_type": model_type,
        "base_model_type": base_model_type,
        "kv_dmc_method": method,
        "auto_map": {auto: f"{MODULE}.{name}" for auto, name in zip(autos, names, strict=True)},
        "__module__": __name__,
    }
    config = type(names[0], (_Config, base), body)
    models = [
        type(name, (_Model, cls), {"config_class": config, "forward": with_cache(cls), "__module__": __name__})
        for name, cls in zip(names[1:], bases, strict=True)
    ]
    models[1].generate = either_name(bases[1].generate)
    # architectures whose files name weights otherwise go by the model type
    for new, old in ((model_type, base_model_type), *zip(names[1:], [cls.__name__ for cls in bases], strict=True)):
        conversion = get_checkpoint_conversion_mapping(old)
        if conversion is not None:
            register_checkpoint_conversion_mapping(new, conversion, overwrite=True)
    return Classes(config, *models)


def register(method: str, base_model_type: str) -> Classes:
    """Make `classes_of` known to transformers' Auto classes in this process."""
    classes = classes_of(method, base_model_type)
    AutoConfig.register(classes.config.model_type, classes.config, exist_ok=True)
    AutoModel.register(classes.config, classes.model, exist_ok=True)
    AutoModelForCausalLM.register(classes.config, classes.causal_lm, exist_ok=True)
    return classes


def read_settings(config: dict) -> Settings:
    """Settings out of a `config.json`.

    Raises:
        AdapterError: they are missing, impossible, or others than those that were saved.
    """
    try:
        settings = Settings.from_dict(config.get("kv_dmc"))
    except ValueError as error:
        raise AdapterError(f"kv_dmc of the config: {error}") from error
    if config.get("model_type", "").partition("_")[0] != settings.method:
        raise AdapterError(f"a model of type {config.get('model_type')!r} cannot have settings for {settings.method!r}")
    facts = config.get("kv_dmc_facts")
    if not isinstance(facts, dict) or facts.get("digest") != settings.digest:
        raise AdapterError(
            "kv_dmc of the config has been edited: the weights were trained for other settings, and are useless with "
            "these"
        )
    return settings


def __getattr__(name: str):
    # by their names, for pickle and for the files that folders bring along
    method, base = name[:3].lower(), getattr(transformers, name[3:], None) if name[:3] in ("DMC", "DMS") else None
    base = getattr(base, "config_class", base)
    if getattr(base, "model_type", None):
        for cls in classes_of(method, base.model_type):
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
