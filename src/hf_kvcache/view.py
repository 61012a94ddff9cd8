"""The handle that `cache.update` returns and attention reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hf_kvcache.cache import KVCache, KVLayer


class KVView:
    """What attention sees of one layer after `update`: the store's rows, not a dense tensor.

    Attributes:
        layer: the `KVLayer` whose rows these are; its store already holds the new rows.
        cache: the cache that owns the layer, or None outside a cache.
        new_k, new_v: the rows of this call, dense, `[B, Hkv, S, D]`.
        is_prefill: whether the layer was empty before this call, so that `new_k` and `new_v` are everything.
        module: the attention module that reads this view, while it does.
    """

    __slots__ = ("layer", "cache", "new_k", "new_v", "is_prefill", "module")

    def __init__(self, layer: KVLayer, new_k: torch.Tensor, new_v: torch.Tensor, is_prefill: bool):
        self.layer, self.new_k, self.new_v, self.is_prefill = layer, new_k, new_v, is_prefill
        self.cache: KVCache | None = None
        self.module: torch.nn.Module | None = None

    @property
    def n_new(self) -> int:
        """Rows of this call: `S`."""
        return self.new_k.shape[2]

    @property
    def n_kept(self) -> int:
        """Rows kept per head, the new ones included: `N`."""
        return self.layer.store.n_kept

    @property
    def tokens_seen(self) -> int:
        """Tokens this layer has seen, the new ones included: `T`."""
        return self.layer.tokens_seen

    @property
    def positions(self) -> torch.Tensor | None:
        """Logical position of every kept row, int32 `[B, Hkv, N]`, -1 for padding; None when all rows are kept."""
        return self.layer.store.positions

    @property
    def dtype(self) -> torch.dtype:
        return self.new_k.dtype

    @property
    def device(self) -> torch.device:
        return self.new_k.device

    @property
    def scaling(self) -> float:
        """Factor on the scores of this layer."""
        return self.layer.scaling

    @property
    def softcap(self) -> float | None:
        """Softcap of the scores of this layer."""
        return self.layer.softcap

    @property
    def memory(self) -> dict[str, torch.Tensor]:
        """What the layer's policy remembers beside the rows, `[B, Hkv, 1, ...]` by name (`remember` writes it)."""
        return self.layer.store.memory.views()

    def remember(self, **tensors: torch.Tensor) -> None:
        """Keep these `[B, Hkv, 1, ...]` instead of what was remembered: they follow batch operations and are saved."""
        self.layer.store.remember(tensors)

    def queries(self, n: int) -> torch.Tensor:
        """The newest `n` queries of the layer after RoPE (fewer, if it has seen fewer), `[B, Hkv, G, S, D]`."""
        return self.layer.store.newest_queries(n).transpose(2, 3)

    def state(self, name: str) -> torch.Tensor:
        """Per-row state `[B, Hkv, N]` in view order, to read."""
        return self.layer.store.state(name)

    def set_state(self, name: str, values: torch.Tensor) -> None:
        """Overwrite per-row state, `[B, Hkv, N]` in view order."""
        self.layer.store.set_state(name, values)

    def blocks(self, size: int = 1024) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Dense K and V `[B, Hkv, <= size, D]`, block by block in view order."""
        return self.layer.store.blocks(size)

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense K and V `[B, Hkv, N, D]`, in the order of the positions (allocates them)."""
        if self.is_prefill:
            return self.new_k, self.new_v
        return self.layer.store.logical_rows()

    def __getattr__(self, name: str):
        raise AttributeError(
            f"a KVView has no {name!r}: this attention implementation expects tensors. Load the model with "
            'attn_implementation="hf_kvcache" (or "sdpa", "eager"), or call view.materialize()'
        )
