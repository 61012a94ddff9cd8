"""The retrofit of one attention module, and of a model."""

from __future__ import annotations

import torch
from torch import nn

from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.modules import RETROFIT_CHILD, attentions, full_attentions
from hf_kvcache.attention.interface import register_pass_throughs
from hf_kvcache.dmc.hooks import Call, Deciding, Hooks
from hf_kvcache.dmc.settings import Settings


class Retrofit(Deciding, nn.Module):
    """Decisions of one attention module: hangs on it under the name `kv_dmc`, and hooks its projections.

    Args:
        settings: see `Settings`.
        n_kv_heads, hidden_size: of the attention module.

    Attributes:
        decision, importance: weights `[Hkv, hidden]` that start at zero, where decisions are not borrowed; importance
            is None for DMS.
        compresses, noise, fade, call: see `hooks.Owner` and `hooks.Hooks`.
    """

    is_active = True

    def __init__(self, settings: Settings, n_kv_heads: int, hidden_size: int):
        super().__init__()
        self.settings, self.compresses, self.fade = settings, True, 0.0
        self.noise: torch.Tensor | None = None
        is_borrowed = settings.decision == "borrowed"
        shape = n_kv_heads, hidden_size
        self.decision = None if is_borrowed else nn.Parameter(torch.zeros(shape))
        self.importance = None if is_borrowed or not settings.merges else nn.Parameter(torch.zeros(shape))
        self.hooks = Hooks(self)

    def rows(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        # a call, so that weights that are kept elsewhere (`device_map`) are brought for it
        return self()

    def forward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.decision, self.importance

    @property
    def call(self) -> Call | None:
        """What was decided in the newest call of the attention module."""
        return self.hooks.call

    def extra_repr(self) -> str:
        return f"{self.settings.method}, window={self.settings.window}, {self.settings.decision}"


def retrofit(model: nn.Module, settings: Settings) -> dict[int, Retrofit]:
    """Let the full-attention layers of a model decide (in place); returns their retrofits by layer.

    With borrowed channels the model's own weights decide from now on, which before training they have not learned:
    `training.zero_rows` lets it start from keeping everything.

    Raises:
        AdapterError: the model has no layers that could be retrofitted, or is retrofitted already.
    """
    register_pass_throughs()
    found = full_attentions(model)
    if not found:
        raise AdapterError(f"{type(model).__name__} has no full-attention modules that could be retrofitted")
    for i, attention in found.items():
        if hasattr(attention.module, RETROFIT_CHILD):
            raise AdapterError(f"layer {i} is retrofitted already")
        D = attention.head_dim
        if settings.ablates and not -D <= settings.neuron < D:
            raise AdapterError(f"neuron={settings.neuron} is none of the {D} channels of layer {i}")
    for attention in found.values():
        weight = next(attention.module.parameters())
        child = Retrofit(settings, attention.n_kv_heads, attention.module.config.hidden_size)
        child.to(device=weight.device, dtype=weight.dtype).train(attention.module.training)
        setattr(attention.module, RETROFIT_CHILD, child)
        child.hooks.hang(attention.module)
    return retrofits(model)


def retrofits(model: nn.Module) -> dict[int, nn.Module]:
    """What decides in a model, by layer: `Retrofit`s, or their PEFT form; those that are active."""
    children = {i: getattr(a.module, RETROFIT_CHILD, None) for i, a in attentions(model).items()}
    return {i: child for i, child in children.items() if child is not None and child.is_active}
