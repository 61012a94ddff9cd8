"""Models as repositories that bring the code of their cache: loaded anywhere, with `trust_remote_code=True`.

    config.json                 the base model's, `model_type` and `auto_map` of its own, `kv_cache` and `kv_adapter`
    modeling_<family>_<base>.py classes that take the cache unasked
    *.py                        the modules of this library that they need, whole, with the Triton kernels
    model.safetensors           all weights, those of an adapter among them
    README.md                   the model card

The code needs torch and transformers; Triton where there is a GPU, else it runs in plain PyTorch.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from pprint import pformat

import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_kvcache.adapters.carried import carried
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.modules import CHILDREN
from hf_kvcache.cache import KVCache
from hf_kvcache.compat import CACHE_NAME
from hf_kvcache.dmc.policies import TrainedEviction
from hf_kvcache.dmc.settings import Settings
from hf_kvcache.hub.card import card_of
from hf_kvcache.hub.flatten import files_of
from hf_kvcache.hub.recipes import classes_in, roots_of
from hf_kvcache.hub.spec import spec_of
from hf_kvcache.policies.locret import Locret

_OWN = (
    "_name_or_path",
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "kv_cache",
    "kv_adapter",
    "kv_dmc",
    "kv_dmc_facts",
)
_NAME = re.compile(r"[a-z][a-z0-9]*")

_MODELING = '''# SPDX-License-Identifier: Apache-2.0
"""{causal_lm}: {base} with the KV cache of `config.kv_cache`, made by hf_kvcache {version}."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import {theirs}

{imports}

# cache_of and the dispatcher find these by their names; transformers fetches the files that are named here
# ruff: noqa: F401
if TYPE_CHECKING:
{mentions}

__all__ = [{all}]


class {family}{config}({config}):
    """That of {base}.

    Attributes:
        kv_cache: the arguments of the cache.
        kv_adapter: what the model carries for it, or None.
    """

    model_type = "{model_type}"
    kv_cache = None
    kv_adapter = None


class {family}{model}(CacheModel, {model}):
    config_class = {family}{config}
    forward = with_cache({model})


class {causal_lm}(CacheModel, {base}):
    config_class = {family}{config}
    forward = with_cache({base})
    generate = either_name({base}.generate)
'''


_GENERATE = '''# SPDX-License-Identifier: Apache-2.0
"""`generate` with the KV cache of `CACHE`, for any model; made by hf_kvcache {version}."""

from __future__ import annotations

from typing import TYPE_CHECKING

{imports}

# cache_of and the dispatcher find these by their names; transformers fetches the files that are named here
# ruff: noqa: F401
if TYPE_CHECKING:
{mentions}

__all__ = [{all}]

# the arguments of the cache
CACHE = {spec}


def generate(model, inputs=None, **kwargs):
    """As `model.generate`, which it calls; goes on with a cache that is given, as `cache` or as `past_key_values`."""
    kwargs = named_cache(kwargs)
    if given_cache(kwargs) is None:
        kwargs |= cache_argument(cache_of(CACHE, config=model.config))
    return type(model).generate(model, inputs, **kwargs)
'''


def family_of(cache: KVCache) -> str:
    """The name of the family that a cache belongs to: "palu" for latents, "mustafar" for sparse rows, and so on."""
    if cache.policy is not None:
        return {"Locret": "locret", "DMC": "dmc", "DMS": "dms"}.get(type(cache.policy).__name__, "kv")
    formats = " ".join(side.format for side in cache.all_codecs)
    kinds = {"lowrank": "palu", "sparse": "mustafar", "int": "quant"}
    return next((family for kind, family in kinds.items() if kind in formats), "kv")


def export(
    model: torch.nn.Module,
    cache: KVCache,
    directory: str | os.PathLike,
    *,
    tokenizer=None,
    family: str | None = None,
    command: str | None = None,
    license: str | None = None,
    measured: dict | Callable[[], dict] | None = None,
) -> Path:
    """Write a repository whose model has caches like this one.

    Args:
        model: a causal language model of transformers; what its cache goes by (bases, retaining heads, a retrofit) must
            hang on it, or be given to the cache.
        cache: what `generate` will use, empty.
        directory: created if need be; files of the same names are replaced, code of an earlier export goes.
        tokenizer: saved beside it.
        family: how the model type begins; see `family_of`.
        command, license, measured: what the card says, see `card_of`. A function is called when all is written, so that
            what cannot be exported is found before it is measured.

    Returns:
        The folder.

    Raises:
        AdapterError: the model has no class of its own in transformers, lacks what the cache goes by, or would have to
            carry two things for it.
        ValueError: the cache does what a repository cannot describe.
    """
    from hf_kvcache import __version__

    family = family_of(cache) if family is None else family
    if not _NAME.fullmatch(family):
        raise ValueError(f"family={family!r} must be a lower-case word: the model type begins with it")
    base, plain, config = _bases(model)
    adapter, tensors = carried(model, cache)
    spec = _exported_spec(cache)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = files_of(roots_of(cache, adapter, model.config), __version__)
    prefix = family.upper() if len(family) == 3 else family.capitalize()
    names = {
        "base": base.__name__,
        "model": plain.__name__,
        "config": config.__name__,
        "causal_lm": prefix + base.__name__,
        "family": prefix,
        "model_type": f"{family}_{config.model_type}",
        "version": __version__,
    }
    module = f"modeling_{names['model_type']}"
    files[f"{module}.py"] = _modeling(files, cache, names)
    of_children = tuple(f".{child}." for child in CHILDREN)
    weights = {name: t for name, t in model.state_dict().items() if not any(c in name for c in of_children)} | tensors
    _save_weights(model, base, config, weights, directory)
    values = {key: value for key, value in model.config.to_dict().items() if key not in _OWN}
    values |= {
        "model_type": names["model_type"],
        "architectures": [names["causal_lm"]],
        "auto_map": {
            "AutoConfig": f"{module}.{prefix}{names['config']}",
            "AutoModel": f"{module}.{prefix}{names['model']}",
            "AutoModelForCausalLM": f"{module}.{names['causal_lm']}",
        },
        "kv_cache": spec,
        "kv_adapter": adapter,
        "hf_kvcache_version": __version__,
    }
    if adapter is not None and adapter["kind"] == "retrofit":
        # `dmc.load` reads the folder, too
        known = getattr(model.config, "kv_dmc_facts", None) or {}
        digest = Settings.from_dict(adapter["settings"]).digest
        values |= {"kv_dmc": adapter["settings"], "kv_dmc_facts": known | {"digest": digest}}
    _clear(directory)
    for name, text in files.items():
        (directory / name).write_text(text)
    (directory / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    source = model.config.name_or_path
    base_model = source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists() else None
    described = json.dumps(spec, indent=2)
    card = functools.partial(card_of, base_model, names, family, described, command, license)
    (directory / "README.md").write_text(card(None if callable(measured) else measured))
    if callable(measured):
        (directory / "README.md").write_text(card(measured()))
    return directory


def _exported_spec(cache: KVCache) -> dict:
    """What `spec_of` says of a cache that `generate` alone can fill."""
    if cache.policy is not None and cache.policy.reads_twice:
        name = type(cache.policy).__name__
        raise ValueError(f"{name} reads a prompt twice, by hf_kvcache.prefill, which what is exported does not call")
    return spec_of(cache)


def export_generate(cache: KVCache, directory: str | os.PathLike) -> Path:
    """Write a repository whose `generate` gives any model a cache like this one.

    `model.generate(**inputs, custom_generate=where, trust_remote_code=True)` then uses it; with `cache=` (before
    transformers 5.24: `past_key_values=`) it goes on with a cache of an earlier call.

    Args:
        cache: empty; a method that needs nothing of the model.
        directory: created if need be.

    Returns:
        The folder.

    Raises:
        ValueError: the cache goes by something that a model carries.
    """
    from hf_kvcache import __version__

    if isinstance(cache.policy, (TrainedEviction, Locret)):
        raise ValueError(f"{type(cache.policy).__name__} goes by what a model carries: export that model")
    files = files_of(roots_of(cache), __version__)
    used = {"compat": ["cache_argument", "given_cache", "named_cache"], "hub_spec": ["cache_of"]}
    imports, mentions, parts = _found(files, cache, used)
    values = {
        "version": __version__,
        "imports": imports,
        "mentions": mentions,
        "spec": pformat(_exported_spec(cache), width=120),
    }
    files["generate.py"] = _GENERATE.format(
        **values, all=", ".join(f'"{name}"' for name in sorted([*parts, "generate"]))
    )
    folder = Path(directory) / "custom_generate"
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    for name, text in files.items():
        (folder / name).write_text(text)
    return Path(directory)


def _clear(folder: Path) -> None:
    """Take away the code of an earlier export, which may have been of another cache."""
    for path in folder.glob("*.py"):
        head = path.read_text().splitlines()[:2]
        if head[:1] == ["# SPDX-License-Identifier: Apache-2.0"] and "hf_kvcache" in "".join(head[1:]):
            path.unlink()


def _save_weights(model, base: type, config: type, weights: dict[str, torch.Tensor], directory: Path) -> None:
    """Weights and generation config, as transformers writes them for the base model."""
    plain = copy.copy(model)
    plain.__class__ = base
    plain.config = config(**{key: value for key, value in model.config.to_dict().items() if key not in _OWN})
    plain._hf_peft_config_loaded = False
    # conversions of older names are for the classes of transformers alone
    plain.save_pretrained(directory, state_dict=weights, save_original_format=False)


def _bases(model) -> tuple[type, type, type]:
    """The classes that transformers has for a model: with a head, without, and of its config."""
    kind = getattr(model.config, "base_model_type", model.config.model_type)
    config = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else None
    mappings = AutoModelForCausalLM._model_mapping, AutoModel._model_mapping
    if config is None or any(config not in mapping for mapping in mappings):
        raise AdapterError(f"transformers has no causal language model of type {kind!r}")
    base, plain = (found[0] if isinstance(found := mapping[config], tuple) else found for mapping in mappings)
    if CACHE_NAME not in inspect.signature(base.forward).parameters:
        raise AdapterError(f"{base.__name__} takes no cache: its forward has no argument {CACHE_NAME}")
    if not isinstance(model, base):
        raise AdapterError(f"{type(model).__name__} is not what AutoModelForCausalLM makes of {kind!r}")
    return base, plain, config


def _modeling(files: dict[str, str], cache: KVCache, names: dict[str, str]) -> str:
    """The file that `auto_map` names."""
    imports, mentions, parts = _found(files, cache, {"hub_modeling_mixin": ["CacheModel", "either_name", "with_cache"]})
    own = [names["causal_lm"], *(names["family"] + names[name] for name in ("config", "model"))]
    values = names | {
        "theirs": ", ".join(sorted(names[name] for name in ("config", "model", "base"))),
        "imports": imports,
        "mentions": mentions,
        "all": ", ".join(f'"{name}"' for name in sorted([*own, *parts])),
    }
    return _MODELING.format(**values)


def _found(files: dict[str, str], cache: KVCache, imports: dict[str, list[str]]) -> tuple[str, str, list[str]]:
    """Imports of the file that transformers loads first: what it uses, what is found by name, names of the latter."""
    parts = classes_in(cache)
    for module, name in parts:
        imports.setdefault(module, []).append(name)
    lines = [f"from .{module} import {', '.join(sorted(imports[module]))}" for module in sorted(imports)]
    reached = _reached(files, imports)
    hidden = sorted({name.removesuffix(".py") for name in files} - reached)
    mentions = [f"    from .{stem} import __name__ as {stem}" for stem in hidden]
    return "\n".join(lines), "\n".join(mentions), [name for _, name in parts]


def _reached(files: dict[str, str], start) -> set[str]:
    """Files that transformers finds by the relative imports in others."""
    found, todo = set(), list(start)
    while todo:
        stem = todo.pop()
        if stem not in found and f"{stem}.py" in files:
            found.add(stem)
            todo += re.findall(r"^\s*from\s+\.(\S+)\s+import", files[f"{stem}.py"], re.MULTILINE)
    return found
