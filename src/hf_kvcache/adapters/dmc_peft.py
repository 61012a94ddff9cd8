"""DMC and DMS as a PEFT adapter: decisions by weights of their own, on a base model that stays as it is.

While the adapter is active, attention merges or drops tokens, and `DMCCache()` or `DMSCache()` keeps what is left
(Nawrot et al. 2024, arXiv 2403.09636; Lancucki et al. 2025, arXiv 2506.05345). Importing this module makes the method
known to PEFT.

Beside an adapter of another method (LoRA on the projections) give both different names: PEFT tells them apart by name
when it saves.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from hf_kvcache.adapters import dmc_files, having_peft, tuner  # noqa: F401
from hf_kvcache.adapters.dmc_files import PARTS, SETTINGS, settings_of
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.modules import RETROFIT_CHILD, attentions, full_attentions
from hf_kvcache.adapters.peft_types import peft_type, register
from hf_kvcache.attention.interface import register_pass_throughs
from hf_kvcache.dmc.hooks import Call, Deciding, Hooks
from hf_kvcache.dmc.settings import Settings

KV_DMC = peft_type(dmc_files.PEFT_TYPE)


@dataclass
class DMCConfig(tuner.ChildConfig):
    """What `adapter_config.json` says of a retrofit.

    Attributes:
        method, decision, neuron, offset, scale, tau, window, zero_after_rope, per: as in `Settings`, whose defaults
            they have unless told, but for `decision`, which is "linear" or "rows".
        digest: shows whether somebody has edited the settings of a trained adapter; filled in.
        layers: that decide: all full-attention layers; filled in from the model.
        num_kv_heads, hidden_size: of the model; filled in from it.
        target_ratio, achieved_ratio: tokens per row that the training asked for, and got.
        tokens_seen: in training.
        fingerprint: what tells the base model from others; None fits every model of these shapes. Filled in for
            training.
        target_modules: not used; attention modules are found by what they have.
    """

    method: str | None = field(default=None, metadata={"help": "'dmc' or 'dms'"})
    decision: str | None = field(default=None, metadata={"help": "'linear' or 'rows'"})
    neuron: int | None = field(default=None, metadata={"help": "channel that 'rows' take the place of"})
    offset: float | None = field(default=None, metadata={"help": "subtracted from logits"})
    scale: float | None = field(default=None, metadata={"help": "of logits before the offset"})
    tau: float | None = field(default=None, metadata={"help": "temperature of training"})
    window: int | None = field(default=None, metadata={"help": "members of a mean, or tokens before one is dropped"})
    zero_after_rope: bool | None = field(default=None, metadata={"help": "as the released code does"})
    per: str | None = field(default=None, metadata={"help": "'head' or 'layer'"})
    digest: str | None = field(default=None, metadata={"help": "of the settings"})
    layers: list[int] | None = field(default=None, metadata={"help": "that decide"})
    num_kv_heads: int | None = field(default=None, metadata={"help": "KV heads of the model"})
    hidden_size: int | None = field(default=None, metadata={"help": "of the model"})
    target_ratio: float | None = field(default=None, metadata={"help": "tokens per row asked for"})
    achieved_ratio: float | None = field(default=None, metadata={"help": "tokens per row"})
    tokens_seen: int | None = field(default=None, metadata={"help": "in training"})
    fingerprint: dict | None = field(default=None, metadata={"help": "what tells the base model from others"})
    format_version: int = field(default=dmc_files.FORMAT_VERSION, metadata={"help": "of the files"})
    hf_kvcache_version: str | None = field(default=None, metadata={"help": "release that wrote the adapter"})
    target_modules: list | None = field(default=None, metadata={"help": "not used"})

    kind: ClassVar = KV_DMC
    format: ClassVar = dmc_files.FORMAT

    @property
    def settings(self) -> Settings:
        return settings_of(vars(self), "DMCConfig")

    def fill_in(self, model: nn.Module) -> None:
        for attention in attentions(model).values():
            child = getattr(attention.module, RETROFIT_CHILD, None)
            if child is not None and not isinstance(child, DMCLayer):
                raise AdapterError(f"layer {attention.layer_idx} is retrofitted already, and not by an adapter")
        # one that knows its model comes from a file, where nothing may be missing
        if self.hidden_size is None:
            self._complete(model)
        dmc_files.check_config(vars(self), "DMCConfig")
        dmc_files.check_fit(vars(self), model)

    def _complete(self, model: nn.Module) -> None:
        given = {name: getattr(self, name) for name in SETTINGS if getattr(self, name) is not None}
        try:
            settings = Settings(**{"decision": "linear"} | given)
        except ValueError as error:
            raise AdapterError(f"DMCConfig: {error}") from error
        for name, value in settings.to_dict().items():
            setattr(self, name, value)
        self.digest = settings.digest
        found = full_attentions(model)
        if not found:
            raise AdapterError(f"{type(model).__name__} has no full-attention modules that could be retrofitted")
        some = next(iter(found.values()))
        self.num_kv_heads = self.num_kv_heads or some.n_kv_heads
        self.hidden_size = some.module.config.hidden_size
        self.layers = sorted(found) if self.layers is None else self.layers

    def layer_indices(self) -> list[int]:
        return self.layers


class DMCLayer(Deciding, tuner.ChildLayer):
    """Decisions of one attention module by adapter name; what carries hooks, see `hooks.Owner`.

    Attributes:
        kv_dmc_decision: `[Hkv, hidden]` by adapter name.
        kv_dmc_importance: `[Hkv, hidden]` by adapter name, for DMC alone.
        compresses, noise, fade, call: see `hooks.Owner` and `hooks.Hooks`.
    """

    adapter_layer_names = tuple(f"{RETROFIT_CHILD}_{part}" for part in PARTS)
    other_param_names = ("_settings",)

    def __init__(self):
        super().__init__()
        self._settings: dict[str, Settings] = {}
        self.compresses, self.fade = True, 0.0
        self.noise: torch.Tensor | None = None
        self.hooks = Hooks(self)

    # -- what hooks, caches and trainers ask -------------------------------------------------------------------------

    @property
    def names(self) -> dict[str, Settings]:
        """Settings by adapter name."""
        return self._settings

    @property
    def settings(self) -> Settings | None:
        """Of the current adapter."""
        return self._settings.get(self.current)

    @property
    def call(self) -> Call | None:
        """What was decided in the newest call of the attention module."""
        return self.hooks.call

    def rows(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights `[Hkv, hidden]` of decisions and importance; the latter is None for DMS.

        Raises:
            AdapterError: the adapter's file did not hold them all.
        """
        name = self.current
        self.check_loaded(name)
        return self.kv_dmc_decision[name], self.kv_dmc_importance[name] if self.settings.merges else None

    # -- what PEFT asks ----------------------------------------------------------------------------------------------

    def add(self, adapter_name: str, config: DMCConfig, attention: nn.Module) -> None:
        register_pass_throughs()
        # a new module trains, and would relax the decisions of a model that does not
        self.train(attention.training)
        shapes = dmc_files.shapes(vars(config))
        for part in PARTS:
            shape = shapes.get((attention.layer_idx, part))
            if shape is not None:
                getattr(self, f"{RETROFIT_CHILD}_{part}")[adapter_name] = self.start(torch.zeros(shape), config)
        self._settings[adapter_name] = config.settings
        self.hooks.hang(attention)

    def remove(self) -> None:
        self.hooks.remove()

    def extra_repr(self) -> str:
        return ", ".join(f"{name!r}: {own.method}, window={own.window}" for name, own in self._settings.items())


class DMCModel(tuner.ChildModel):
    """Hangs a `DMCLayer` on every full-attention module."""

    prefix = f"{RETROFIT_CHILD}_"
    child = RETROFIT_CHILD
    tuner_layer_cls = DMCLayer
    config_cls = DMCConfig
    no_merge = (
        "an adapter that decides about tokens adds nothing to the base weights, so there is nothing to merge; unload() "
        "takes it off"
    )


register(KV_DMC, DMCConfig, DMCModel)


def attach(model: nn.Module, adapter: str | os.PathLike, name: str = "default", trainable: bool = False, **hub) -> None:
    """Put an adapter on a model without PEFT's loaders: what `model.load_adapter(directory, name)` would do.

    The model merges or drops tokens from now on; which of its other parameters are trained stays as it is.

    Args:
        model: a transformers model, or one that PEFT has wrapped.
        adapter: folder or Hub repository to load it from.
        name: of the adapter; another than those of the adapters that are there.
        trainable: whether its parameters are.
        hub: `revision`, `token`, `subfolder` and the like for the Hub.

    Raises:
        AdapterError: the adapter cannot be loaded, does not fit, or the name is taken.
    """
    tuner.check_name(tuner.bare(model), name)
    config, tensors = dmc_files.FORMAT.read(adapter, **hub)
    facts = "target_ratio", "achieved_ratio", "tokens_seen", "fingerprint", "hf_kvcache_version"
    taken = (*SETTINGS, "digest", "layers", "num_kv_heads", "hidden_size", "base_model_name_or_path", *facts)
    fields = {key: config.get(key) for key in taken}
    tuner.put(model, DMCConfig(task_type="CAUSAL_LM", inference_mode=not trainable, **fields), tensors, name, trainable)
