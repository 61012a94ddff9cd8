"""What our PEFT adapters share: a child of attention modules, which wraps nothing, and the model that hangs it there.

PEFT calls a `BaseTunerLayer` a layer and a `BaseTuner` a model; both are found, saved, switched and freed by it.
Beside an adapter of another method (LoRA on the projections) give both different names: PEFT tells them apart by name
when it saves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from hf_kvcache.adapters import cards, files, fit
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.kinds import Kind
from hf_kvcache.adapters.modules import attentions
from hf_kvcache.adapters.peft_types import peft_type


@dataclass
class ChildConfig(PeftConfig):
    """A config that is filled in from the model."""

    fingerprint: dict | None = field(default=None, metadata={"help": "of the base model; None fits all of its shapes"})
    format_version: int = field(default=Kind.version, metadata={"help": "of the files"})
    hf_kvcache_version: str | None = field(default=None, metadata={"help": "release that wrote the adapter"})
    target_modules: list | None = field(
        default=None, metadata={"help": "not used: modules are found by what they have"}
    )

    kind: ClassVar[Kind]

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = peft_type(self.kind.peft_type)
        self.kind.check_version(self.format_version, "the adapter has")
        if self.hf_kvcache_version is None:
            from hf_kvcache import __version__

            self.hf_kvcache_version = __version__

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder: str | None = None, **kwargs):
        """As PEFT's, which asks for the config before it touches the model: the tensors beside it are checked, too.

        A folder with a config alone is read as such.

        Raises:
            AdapterError: as `Kind.read`; tensors are pickled, damaged, or not those of the config.
        """
        hub = {name: value for name, value in kwargs.items() if name in files.HUB} | {"subfolder": subfolder}
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        is_alone = folder.is_dir() and not any((folder / name).exists() for name in (files.TENSORS, files.PICKLE))
        if not is_alone:
            cls.kind.verify(pretrained_model_name_or_path, **hub)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def to_dict(self) -> dict:
        return super().to_dict() | {"peft_type": files.written(self.kind.peft_type)}

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """As PEFT's, with a README; the tensors are there by now.

        Raises:
            AdapterError: they have been pickled (`safe_serialization=False`), and would never be read.
        """
        folder = Path(save_directory)
        if (folder / files.PICKLE).exists() and not (folder / files.TENSORS).exists():
            raise AdapterError(f"{folder} has its tensors pickled; adapters of ours are safetensors, and nothing else")
        super().save_pretrained(save_directory, **kwargs)
        cards.write(folder, super().to_dict(), self.kind.card)

    def complete(self, model: nn.Module) -> None:
        """Take from the model what was left open, and check that the rest fits it.

        Raises:
            AdapterError: names what differs, or what the config lacks.
        """
        self.fill_in(model)
        self.kind.check(vars(self), type(self).__name__)
        fit.check_fit(self.kind, vars(self), model)
        if not self.inference_mode:
            self.tie(model)

    def tie(self, model: nn.Module) -> None:
        """Record what tells the model from others, unless that is known."""
        if self.fingerprint is None:
            self.fingerprint = fit.fingerprint(attentions(model)[min(self.layer_indices())].module)

    def default(self, **values) -> None:
        """Set what has been left open."""
        for name, value in values.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def fill_in(self, model: nn.Module) -> None:
        """Take from the model what was left open."""
        raise NotImplementedError

    def layer_indices(self) -> list[int]:
        """Of the attention modules that get a child."""
        return self.kind.layers(vars(self))


class ChildLayer(nn.Module, BaseTunerLayer):
    """Parameters by adapter name on an attention module. It wraps nothing; caches ask it.

    Subclasses name their parameters in `adapter_layer_names`, each a `ParameterDict`.
    """

    other_param_names = ("_settings",)

    def __init__(self):
        super().__init__()
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._device = torch.device("cpu")
        self._settings: dict[str, object] = {}
        self._current: str | None = None
        self._unchecked: set[str] = set()

    @property
    def names(self) -> dict[str, object]:
        """`Kind.settings` by the names of the adapters that are here, be there parameters or not."""
        return self._settings

    @property
    def settings(self):
        """`Kind.settings` of the current adapter."""
        return self._settings.get(self.current)

    def initial(self, part: str, shape: tuple[int, ...], attention: nn.Module) -> torch.Tensor:
        """What a parameter begins with that comes from no file."""
        return torch.zeros(shape)

    def hang(self, adapter_name: str, config: ChildConfig, attention: nn.Module) -> None:
        """The parameters of an adapter are there: what else it needs of its attention module."""

    def remove(self) -> None:
        """The child leaves its attention module, or has no adapter any more."""

    @property
    def current(self) -> str | None:
        """The adapter that was activated last; that one of another method was activated since says nothing of ours."""
        return self._current if self._current in self.names else None

    @property
    def is_active(self) -> bool:
        """Whether there is an adapter, and adapters are not disabled."""
        return self.current is not None and not self.disable_adapters

    def check_loaded(self, name: str) -> None:
        """Once per adapter: transformers reads its file by itself, takes any values, and only warns of missing ones.

        Raises:
            AdapterError: there are NaN or infinity among its parameters.
        """
        # under a compiler there is nobody to raise to
        if name not in self._unchecked or torch.compiler.is_compiling():
            return
        held = [getattr(self, own) for own in self.adapter_layer_names]
        if not all(parameters[name].isfinite().all() for parameters in held if name in parameters):
            raise AdapterError(f"adapter {name!r}: weights were missing in its file, or are NaN or infinity")
        self._unchecked.discard(name)

    # -- what PEFT asks ----------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: ChildConfig, attention: nn.Module) -> None:
        """Add an adapter, on the device of the attention module."""
        device = next(attention.parameters()).device
        # offloaded weights are on no device; these are small and stay
        self._device = torch.device("cpu") if device.type == "meta" else device
        for (layer_idx, part), shape in config.kind.shapes(vars(config)).items():
            if layer_idx == attention.layer_idx:
                # NaN where a file has others: what it lacks is then seen
                is_read = config.inference_mode
                values = torch.full(shape, torch.nan) if is_read else self.initial(part, shape, attention)
                held = getattr(self, f"{config.kind.child}_{part}")
                held[adapter_name] = nn.Parameter(values.to(self._device), requires_grad=False)
        self._settings[adapter_name] = config.kind.settings(vars(config))
        self.hang(adapter_name, config, attention)
        self._unchecked.add(adapter_name)
        if not self._active_adapter:
            self.set_adapter(adapter_name)

    def set_adapter(self, adapter_names, inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._current = next((name for name in self.active_adapters if name in self.names), self._current)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if self.current is None:
            self._current = next(iter(self.names), None)
        if not self.names:
            self.remove()

    def get_base_layer(self) -> nn.Module:
        return self

    @property
    def weight(self):
        # the inherited one asks the base layer, which is this one again
        raise AttributeError(f"{type(self).__name__} wraps no layer and has no weight")

    @property
    def bias(self):
        raise AttributeError(f"{type(self).__name__} wraps no layer and has no bias")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: PEFT calls this on every layer when another method's adapter beside ours is merged."""

    def unmerge(self) -> None:
        """Nothing, as `merge`."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
        for name in self.adapter_layer_names:
            held = getattr(self, name)
            if adapter_name in held and not held[adapter_name].is_meta:
                held[adapter_name].data = held[adapter_name].data.to(device or self._device)


class ChildModel(BaseTuner):
    """Hangs a child on every attention module that the config names.

    Subclasses set `prefix` and `tuner_layer_cls` as PEFT has it, and the following.

    Attributes:
        config_cls: the config it goes with.
        no_merge: why there is nothing to merge, and what to do instead.
    """

    config_cls: ClassVar[type[ChildConfig]]
    no_merge: ClassVar[str]
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model, peft_config, adapter_name: str, *args, **kwargs):
        # wrapped models share their configs by name: a second method under one name would overwrite the first's
        taken = getattr(model, "peft_config", {}).get(adapter_name)
        if taken is not None and not isinstance(taken, self.config_cls):
            raise AdapterError(
                f"the model has an adapter {adapter_name!r} of {taken.peft_type.value} already; give this one another "
                "adapter_name"
            )
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except Exception:
            if taken is None:
                # PEFT notes the name before it asks whether the adapter fits
                getattr(model, "peft_config", {}).pop(adapter_name, None)
            raise

    @property
    def child(self) -> str:
        """Name of the child."""
        return self.config_cls.kind.child

    def _check_new_adapter_config(self, config) -> None:
        super()._check_new_adapter_config(config)
        # layers are only touched once everything is known to fit
        found = attentions(self.model)
        for i, attention in found.items():
            if not isinstance(getattr(attention.module, self.child, None), self.tuner_layer_cls | None):
                raise AdapterError(f"layer {i} {config.kind.taken} already, and not by an adapter")
        config.complete(self.model)
        # not a field, so that it is not saved: names differ between a model and its wrappers
        config._attention_names = frozenset(found[i].name for i in config.layer_indices())

    def _prepare_adapter_config(self, peft_config, model_config):
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config, key: str) -> bool:
        return key in peft_config._attention_names

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if not hasattr(target, self.child):
            setattr(target, self.child, self.tuner_layer_cls())
        getattr(target, self.child).update_layer(adapter_name, peft_config, target)

    def _check_merge_allowed(self):
        raise AdapterError(self.no_merge)

    def _unload_and_optionally_merge(self, merge: bool = True, *args, **kwargs):
        if merge:
            self._check_merge_allowed()
        for attention in attentions(self.model).values():
            if hasattr(attention.module, self.child):
                getattr(attention.module, self.child).remove()
                delattr(attention.module, self.child)
        for name in [name for name, config in self.peft_config.items() if isinstance(config, self.config_cls)]:
            del self.peft_config[name]
        if not self.peft_config and hasattr(self.model, "peft_config"):
            del self.model.peft_config
            self.model._hf_peft_config_loaded = False
        return self.model

    @classmethod
    def _get_adapter_state_dict(cls, *args, **kwargs):
        # the inherited one returns the weights of all methods on the model
        found = super()._get_adapter_state_dict(*args, **kwargs)
        return {name: t for name, t in found.items() if f".{cls.config_cls.kind.child}.{cls.prefix}" in name}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        # PEFT would load other tensors of the file into the base model; names in models of transformers have no root
        named = {files.ROOT + name.removeprefix(files.ROOT): t for name, t in state_dict.items()}
        config.kind.verify_tensors(named, vars(config), f"adapter {adapter_name!r}")
        return super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # around another method's PeftModel names have the root twice; files have it once
        key, root = super()._remove_adapter_name_from_key(key, adapter_name), files.ROOT
        while key.startswith(root + root):
            key = key.removeprefix(root)
        return key
