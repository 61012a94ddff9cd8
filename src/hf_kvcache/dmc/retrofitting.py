"""The retrofit of one attention module, and of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.modules import RETROFIT_CHILD, attentions, full_attentions
from hf_kvcache.attention.interface import register_pass_throughs
from hf_kvcache.dmc.decisions import logistic_noise
from hf_kvcache.dmc.hooks import Call, Deciding, Hooks
from hf_kvcache.dmc.settings import Settings
from hf_kvcache.former_names import former
from hf_kvcache.shards import clear_rows, refuse_shards


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
    `zero_rows` lets it start from keeping everything.

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


@contextmanager
def compression_off(model: nn.Module) -> Iterator[None]:
    """Run a model without merging or dropping, as its own teacher. The borrowed channel stays out.

    For this thread; others that run the model meanwhile go on compressing.
    """
    hooks = [child.hooks for child in retrofits(model).values()]
    for own in hooks:
        own.n_off += 1
    try:
        yield
    finally:
        for own in hooks:
            own.n_off -= 1


def draw_noise(model: nn.Module, batch: int, n_tokens: int, seed: int, device=None) -> None:
    """Give all layers the noise of one training step: outside the layers, so that recomputing them finds the same."""
    generator = torch.Generator().manual_seed(seed)
    for attention in attentions(model).values():
        child = getattr(attention.module, RETROFIT_CHILD, None)
        if child is not None:
            # heads that decide together draw together
            n_heads = attention.n_kv_heads if child.settings.per == "head" else 1
            noise = logistic_noise((batch, n_heads, n_tokens), generator, device)
            child.noise = noise.expand(-1, attention.n_kv_heads, -1).contiguous()


@torch.no_grad()
def zero_rows(model: nn.Module) -> None:
    """Set the weights behind borrowed channels to zero: the model keeps everything, and does without the channels.

    Raises:
        AdapterError: the channels come from a norm or a fused projection, whose weights cannot be told apart.
    """
    for i, child in retrofits(model).items():
        attention = attentions(model)[i]
        for role, heads in _borrowed(attention, child.settings).items():
            channel = child.settings.neuron % attention.head_dim
            for tensor in _affine(attention.module, role):
                clear_rows(tensor, [head * attention.head_dim + channel for head in heads])


@torch.no_grad()
def merge_weights(model: nn.Module) -> None:
    """Write the weights of "rows" retrofits into the channel that attention does without: they are "borrowed" then.

    Raises:
        AdapterError: a layer is no "rows" retrofit, or has a bias or a norm in the way.
        ValueError: several processes share the model.
    """
    from dataclasses import replace

    refuse_shards(model, "merging weights")

    for i, child in retrofits(model).items():
        if not isinstance(child, Retrofit) or child.settings.decision != "rows":
            raise AdapterError(f'layer {i}: only retrofits with decision="rows" can be merged into the weights')
        attention = attentions(model)[i]
        new = {"k": child.decision, "q": child.importance} if child.settings.merges else {"q": child.decision}
        for role, heads in _borrowed(attention, child.settings).items():
            weight, *bias = _affine(attention.module, role)
            places = weight.unflatten(0, (-1, attention.head_dim))[:, child.settings.neuron]
            places[heads] = new[role].to(weight.dtype).repeat_interleave(len(heads) // attention.n_kv_heads, 0)
            for t in bias:
                t.unflatten(0, (-1, attention.head_dim))[heads, child.settings.neuron] = 0
        child.settings = replace(child.settings, decision="borrowed")
        child.decision = child.importance = None


def _borrowed(attention, settings: Settings) -> dict[str, list[int]]:
    """Which heads of queries and keys lend a channel."""
    G = attention.module.num_key_value_groups
    if settings.merges:
        return {"q": list(range(attention.n_heads)), "k": list(range(attention.n_kv_heads))}
    return {"q": list(range(0, attention.n_heads, G))}


def _affine(module: nn.Module, role: str) -> list[torch.Tensor]:
    """Weight, and bias if there is one, of a projection."""
    projection = getattr(module, f"{role}_proj", None)
    if not isinstance(projection, nn.Linear) or getattr(module, f"{role}_norm", None) is not None:
        raise AdapterError(
            f'{type(module).__name__} has no plain {role}_proj whose rows could be borrowed; use decision="linear"'
        )
    return [t for t in (projection.weight, projection.bias) if t is not None]


__getattr__ = former(__name__, {"fold": "merge_weights"}, globals())
