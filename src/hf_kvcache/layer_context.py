"""What a codec may ask of the model: the attention layer whose rows it encodes."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from hf_kvcache import compat
from hf_kvcache.sharded_model import shard_of_heads
from hf_kvcache.shards import Shard

if TYPE_CHECKING:
    from hf_kvcache.codecs.basis import Basis
    from hf_kvcache.rope import Rope


@dataclass(frozen=True, eq=False)
class LayerContext:
    """One attention layer, seen from the cache.

    Attributes:
        module: the attention module.
        layer_idx: its place in the model.
        n_kv_heads, head_dim, dtype, device: of the rows it produces, in this process.
        ropes: rotary embeddings already built, by kind of layer; the layers of a cache share them.
        depth: which of the full-attention layers it is, and how many there are.
        root: the model, where it is not running.
    """

    module: torch.nn.Module
    layer_idx: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    ropes: MutableMapping = field(default_factory=dict)
    depth: tuple[int, int] = (0, 1)
    root: torch.nn.Module | None = None

    @cached_property
    def shard(self) -> Shard:
        """Which of the model's KV heads these are."""
        return shard_of_heads(self.module, self.n_kv_heads)

    def rope(self) -> Rope | None:
        """The layer's RoPE, or None for a layer without. Layers that rotate alike share one.

        Raises:
            ValueError: an embedding that is not understood, or that changes as the text grows.
        """
        from hf_kvcache.rope_of_model import rope_of

        rope = rope_of(self.module, self.head_dim, self.root)
        return None if rope is None else self.ropes.setdefault(rope.kind, rope)

    @property
    def has_rotary_layers(self) -> bool:
        """Whether some layers of the model may rotate their keys, even if this one does not."""
        from hf_kvcache.rotary_embedding import has_rotary

        return has_rotary(self.module)

    def basis(self, side: str, bases=None) -> tuple[Basis, str] | None:
        """The basis of this layer's keys ("k") or values ("v"), and whether bases are of keys "pre" or "post" RoPE.

        Of `bases`, or of the adapter that the model carries; None where there is none.

        Raises:
            ValueError: it is of another model or shape.
        """
        from hf_kvcache.adapters.modules import attached_basis

        if bases is not None:
            bases.check_model(self.module)
            found, made_for = bases.of(self.layer_idx, side), bases.rope
        else:
            found, made_for = attached_basis(self.module, side) or (None, None)
        if found is None:
            return None
        found = found.local_shard(self.shard)
        if found.n_groups * found.width != self.n_kv_heads * self.head_dim:
            raise ValueError(
                f"layer {self.layer_idx}: the basis is of {found.n_groups} groups of {found.width} channels, the model "
                f"has {self.n_kv_heads} KV heads of {self.head_dim}"
            )
        return found, made_for


def context_of(
    module: torch.nn.Module, layer, ropes: MutableMapping, root: torch.nn.Module | None = None
) -> LayerContext:
    """The attention layer whose rows a layer of a cache has seen."""
    hf_layers = compat.hf_layers(module.config)
    # a model that runs its layers several times has more in its cache than its config says
    n_layers = max(len(hf_layers), layer.layer_idx + 1)
    ours = [i for i in range(n_layers) if i >= len(hf_layers) or hf_layers[i] is None]
    sizes = layer.n_kv_heads, layer.head_dim, layer.dtype, layer.device
    return LayerContext(module, layer.layer_idx, *sizes, ropes, (ours.index(layer.layer_idx), len(ours)), root)
