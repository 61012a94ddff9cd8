"""DMC and DMS as a PEFT adapter: decisions by weights of their own, on a base model that stays as it is.

While the adapter is active, attention merges or drops tokens, and `DMCCache()` or `DMSCache()` keeps what is left
(Nawrot et al. 2024, arXiv 2403.09636; Lancucki et al. 2025, arXiv 2506.05345). Importing this module makes the method
known to PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from hf_kvcache.adapters import having_peft, tuner  # noqa: F401
from hf_kvcache.adapters.dmc_files import RETROFIT, SETTINGS
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.modules import RETROFIT_CHILD, full_attentions
from hf_kvcache.adapters.peft_types import peft_type, register
from hf_kvcache.attention.interface import register_pass_throughs
from hf_kvcache.dmc.hooks import Call, Deciding, Hooks
from hf_kvcache.dmc.settings import Settings
from hf_kvcache.warn import warn_once

KV_DMC = peft_type(RETROFIT.peft_type)


@dataclass
class DMCConfig(tuner.ChildConfig):
    """What `adapter_config.json` says of a retrofit; what is left open is as in `Settings`, but for the decision."""

    method: str | None = field(default=None, metadata={"help": "'dmc' or 'dms'"})
    decision: str | None = field(default=None, metadata={"help": "'linear', the default, or 'rows'"})
    neuron: int | None = field(default=None, metadata={"help": "channel that 'rows' take the place of"})
    offset: float | None = field(default=None, metadata={"help": "subtracted from logits"})
    scale: float | None = field(default=None, metadata={"help": "of logits before the offset"})
    tau: float | None = field(default=None, metadata={"help": "temperature of training"})
    window: int | None = field(default=None, metadata={"help": "members of a mean, or tokens before one is dropped"})
    zero_after_rope: bool | None = field(default=None, metadata={"help": "as the released code does"})
    per: str | None = field(default=None, metadata={"help": "'head' or 'layer'"})
    digest: str | None = field(default=None, metadata={"help": "of the settings: shows edits; filled in"})
    layers: list[int] | None = field(default=None, metadata={"help": "that decide: all full attention; filled in"})
    num_kv_heads: int | None = field(default=None, metadata={"help": "KV heads of the model; filled in from it"})
    hidden_size: int | None = field(default=None, metadata={"help": "of the model; filled in from it"})
    target_ratio: float | None = field(default=None, metadata={"help": "tokens per row that training asked for"})
    achieved_ratio: float | None = field(default=None, metadata={"help": "tokens per row that training got"})
    tokens_seen: int | None = field(default=None, metadata={"help": "in training"})
    lora: str | None = field(default=None, metadata={"help": "subfolder of LoRA that was trained with it"})

    kind: ClassVar = RETROFIT

    def fill_in(self, model: nn.Module) -> None:
        # one that knows its model comes from a file, where nothing may be missing
        if self.hidden_size is not None:
            return
        given = {name: getattr(self, name) for name in SETTINGS if getattr(self, name) is not None}
        try:
            settings = Settings(**{"decision": "linear"} | given)
        except ValueError as error:
            raise AdapterError(f"DMCConfig: {error}") from error
        self.digest = settings.digest
        found = full_attentions(model)
        if not found:
            raise AdapterError(f"{type(model).__name__} has no full-attention modules that could be retrofitted")
        some = next(iter(found.values()))
        sizes = {"num_kv_heads": some.n_kv_heads, "hidden_size": some.module.config.hidden_size}
        self.default(**settings.to_dict(), **sizes, layers=sorted(found))


class DMCLayer(Deciding, tuner.ChildLayer):
    """Decisions of one attention module by adapter name; what carries hooks, see `hooks.Owner`.

    Attributes:
        kv_dmc_decision: `[Hkv, hidden]` by adapter name.
        kv_dmc_importance: `[Hkv, hidden]` by adapter name, for DMC alone.
        compresses, noise, fade, call: see `hooks.Owner` and `hooks.Hooks`.
    """

    adapter_layer_names = RETROFIT.parameter_names

    def __init__(self):
        super().__init__()
        self.compresses, self.fade = True, 0.0
        self.noise: torch.Tensor | None = None
        self.hooks = Hooks(self)

    # -- what hooks, caches and trainers ask -------------------------------------------------------------------------

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

    def hang(self, adapter_name, config, attention):
        register_pass_throughs()
        if config.lora and not any(hasattr(module, "lora_A") for module in attention.modules()):
            warn_once(
                f"the adapter {adapter_name!r} was trained with LoRA, which the model lacks: hf_kvcache.attach loads "
                f"both; PEFT and transformers load it from the subfolder {config.lora!r}, as an adapter of its own"
            )
        # a new module trains, and would relax the decisions of a model that does not
        self.train(attention.training)
        self.hooks.hang(attention)

    def remove(self) -> None:
        self.hooks.remove()

    def extra_repr(self) -> str:
        return ", ".join(f"{name!r}: {own.method}, window={own.window}" for name, own in self._settings.items())


class DMCModel(tuner.ChildModel):
    """Hangs a `DMCLayer` on every full-attention module."""

    prefix = f"{RETROFIT_CHILD}_"
    tuner_layer_cls = DMCLayer
    config_cls = DMCConfig
    no_merge = (
        "an adapter that decides about tokens adds nothing to the base weights, so there is nothing to merge; unload() "
        "takes it off"
    )


register(KV_DMC, DMCConfig, DMCModel)
