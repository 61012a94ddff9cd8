"""What only the training of a retrofitted model asks for: teachers, noise, and channels to borrow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.modules import RETROFIT_CHILD, attentions, full_attentions
from hf_kvcache.dmc.decisions import logistic_noise
from hf_kvcache.dmc.retrofitting import Retrofit, retrofits
from hf_kvcache.dmc.settings import Settings
from hf_kvcache.former_names import former
from hf_kvcache.sharded_model import clear_rows, refuse_shards


def common_settings(model: nn.Module) -> Settings:
    """Settings of a model that is retrofitted throughout, for it to be saved.

    Raises:
        AdapterError: it is not, in parts only, by an adapter, or differently in different layers.
    """
    children = {i: getattr(a.module, RETROFIT_CHILD, None) for i, a in full_attentions(model).items()}
    missing = [i for i, child in children.items() if not isinstance(child, Retrofit)]
    if missing or not children:
        where = f"layers {missing} of it are" if 0 < len(missing) < len(children) else "it is"
        raise AdapterError(
            f"{type(model).__name__} does not have a Retrofit in all its full-attention layers, so it cannot be saved "
            f"as a retrofitted model: {where} not retrofitted"
        )
    settings = {child.settings for child in children.values()}
    if len(settings) > 1:
        raise AdapterError(f"the layers of the model have different settings: {settings}")
    return settings.pop()


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
