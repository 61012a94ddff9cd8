"""Which modules of a model adapters belong to, found by what they have and not by class."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from hf_kvcache import compat

if TYPE_CHECKING:
    from hf_kvcache.codecs.basis import Basis

CHILD = "kv_lowrank"  # name under which the low-rank adapter hangs on an attention module
RETAIN_CHILD = "kv_retain"  # and the retaining heads
RETROFIT_CHILD = "kv_dmc"  # and what decides in a model that merges or drops tokens
CHILDREN = (CHILD, RETAIN_CHILD, RETROFIT_CHILD)


class Attention(NamedTuple):
    """One self-attention module of a model.

    Attributes:
        name: path in the model, "" for the model itself.
        module: the attention module.
        n_kv_heads: `Hkv`.
        head_dim: `D`.
    """

    name: str
    module: torch.nn.Module
    n_kv_heads: int
    head_dim: int

    @property
    def layer_idx(self) -> int:
        return self.module.layer_idx

    @property
    def n_heads(self) -> int:
        """`Hq`."""
        return self.n_kv_heads * self.module.num_key_value_groups


def is_attention(module: torch.nn.Module) -> bool:
    """Whether a module is one that calls `cache.update`."""
    return all(hasattr(module, name) for name in ("layer_idx", "num_key_value_groups", "scaling", "head_dim"))


def attentions(model: torch.nn.Module) -> dict[int, Attention]:
    """The attention modules of a model, or of itself alone, by layer."""
    found = {}
    for name, module in model.named_modules():
        if is_attention(module):
            seen = Attention(name, module, module.config.num_key_value_heads, module.head_dim)
            found.setdefault(module.layer_idx, seen)
    return found


def full_attentions(model: torch.nn.Module) -> dict[int, Attention]:
    """Those of `attentions` whose rows our caches compress: neither a sliding window nor linear attention."""
    found = attentions(model)
    if not found:
        return {}
    hf_layers = compat.hf_layers(next(iter(found.values())).module.config)
    return {i: attention for i, attention in found.items() if i >= len(hf_layers) or hf_layers[i] is None}


def attached_basis(module: torch.nn.Module, side: str) -> tuple[Basis, str] | None:
    """What the adapter on an attention module offers: the basis of a side, and its `rope`; None without one.

    Asks by name, so that PEFT is not needed to find that there is no adapter.
    """
    child = getattr(module, CHILD, None)
    basis = None if child is None else child.basis(side)
    return None if basis is None else (basis, child.rope)


def attached_heads(module: torch.nn.Module):
    """The retaining heads on an attention module, a `RetainingHeadLayer`; None without, and while they are disabled.

    While the attention module runs, after its projections, `scores()` is float32 `[B, Hkv, S]` of the tokens of this
    call and `features()` is `[B, S, F]`, what the scores are computed from. Asks by name, so that PEFT is not needed to
    find that there is no adapter.
    """
    child = getattr(module, RETAIN_CHILD, None)
    return child if child is not None and child.is_active else None


def attached_retrofit(module: torch.nn.Module):
    """What decides in a retrofitted attention module, see `dmc.hooks.Owner`; None without, and while it is disabled."""
    child = getattr(module, RETROFIT_CHILD, None)
    return child if child is not None and child.is_active else None
