"""The handles that `cache.update` returns and attention reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from hf_kvcache.former_names import Former
from hf_kvcache.standin import TensorStandIn

if TYPE_CHECKING:
    from hf_kvcache.cache import KVCache
    from hf_kvcache.layer import KVLayer


class _Rows(TensorStandIn):
    """Stands in for a tensor of rows `[B, Hkv, N, D]`, and answers what it can without expanding them.

    Attention functions of the registry get the handle itself. A model that reshapes, splits or expands keys and values
    on its own, between `update` and attention, finds tensors: `KVView.tensors` expands the rows for it.
    """

    __slots__ = ()

    @property
    def _new(self) -> torch.Tensor:
        """The rows of this call, which have the dtype, the device and the other sizes of all."""
        raise NotImplementedError

    @property
    def _n_rows(self) -> int:
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._new.shape[:2], self._n_rows, self._new.shape[3]))

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 4

    @property
    def ndim(self) -> int:
        return 4

    @property
    def dtype(self) -> torch.dtype:
        return self._new.dtype

    @property
    def device(self) -> torch.device:
        return self._new.device

    @property
    def requires_grad(self) -> bool:
        return self._new.requires_grad

    def contiguous(self):
        return self

    def to(self, *args, **kwargs):
        """Itself where that changes nothing, as of tensors."""
        moved = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if (moved.dtype, moved.device) == (self.dtype, self.device):
            return self
        return self._tensor().to(*args, **kwargs)

    def __len__(self) -> int:
        return self.shape[0]


class KVView(_Rows):
    """What attention sees of one layer after `update`: the store's rows, not a dense tensor.

    Where a tensor is expected it behaves as the keys do (see `tensors`).

    Attributes:
        layer: the `KVLayer` whose rows these are; its store already holds the new rows.
        cache: the cache that owns the layer, or None outside a cache.
        new_k, new_v: the rows of this call, dense, `[B, Hkv, S, D]`.
        is_prefill: whether the layer was empty before this call, so that `new_k` and `new_v` are everything.
        module: the attention module that reads this view, while it does.
        is_read: whether attention has been called with it: by the module whose rows these are, which comes first.
    """

    __slots__ = ("layer", "cache", "new_k", "new_v", "is_prefill", "module", "is_read", "_tensors", "_positions")

    def __init__(
        self,
        layer: KVLayer,
        new_k: torch.Tensor,
        new_v: torch.Tensor,
        is_prefill: bool,
        positions: torch.Tensor | None = None,
    ):
        self.layer, self.new_k, self.new_v, self.is_prefill = layer, new_k, new_v, is_prefill
        # policies ask for them again and again, and rows in pages have to be gathered for that
        self._positions = positions
        self.cache: KVCache | None = None
        self.module: torch.nn.Module | None = None
        self.is_read = False
        self._tensors: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def values(self) -> ValueView:
        """The handle of the values, made anew: the view does not hold it, so both go as soon as nobody reads them."""
        return ValueView(self)

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
        return self.layer.store.positions if self._positions is None else self._positions

    @property
    def scaling(self) -> float:
        """Factor on the scores of this layer."""
        return self.layer.scaling

    @property
    def softcap(self) -> float | None:
        """Softcap of the scores of this layer."""
        return self.layer.softcap

    @property
    def layer_state(self) -> dict[str, torch.Tensor]:
        """What the layer's policy holds beside the rows, `[B, Hkv, 1, ...]` by name (`set_layer_state` writes it)."""
        return self.layer.store.layer_state.views()

    memory, remember = Former("layer_state"), Former("set_layer_state")

    def set_layer_state(self, **tensors: torch.Tensor) -> None:
        """Keep these `[B, Hkv, 1, ...]` instead of what was remembered: they follow batch operations and are saved."""
        self.layer.store.set_layer_state(tensors)

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

    def key_blocks(self, size: int = 1024) -> Iterator[torch.Tensor]:
        """Dense K `[B, Hkv, <= size, D]`, block by block in view order; values stay packed."""
        return (k for (k,) in self.layer.store.blocks(size, "k"))

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense K and V `[B, Hkv, N, D]`, in the order of the positions (allocates them)."""
        if self.is_prefill:
            return self.new_k, self.new_v
        return self.layer.store.logical_rows()

    def in_view_order(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense K and V `[B, Hkv, N, D]` in the order of `positions`; allocates them where some rows are packed."""
        if self.is_prefill:
            return self.new_k, self.new_v
        if not self.layer.store.n_packed:
            # rows that are dense already are read where they are
            return self.layer.store.dense["k"], self.layer.store.dense["v"]
        return tuple(torch.cat(rows, 2) for rows in zip(*self.blocks()))

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense K and V `[B, Hkv, N, D]` for a model that computes with them before attention, made once per call.

        The layer compresses once attention has been called with what the model made of them (latents that are
        expanded, as in DeepSeek's MLA), or else, where a model has an attention of its own, before the next rows come.

        Raises:
            ValueError: policy or codec need what they cannot get this way.
        """
        if self._tensors is None:
            if self.cache is not None:
                self.cache.hand_out(self)
            is_whole = self.layer.policy is None
            self._tensors = self.materialize() if is_whole else self.in_view_order()
        return self._tensors

    def _tensor(self) -> torch.Tensor:
        return self.tensors()[0]

    @property
    def _new(self) -> torch.Tensor:
        return self.new_k

    @property
    def _n_rows(self) -> int:
        return self.n_kept


class ValueView(_Rows):
    """The values of a `KVView`: what `update` returns in their place.

    Attributes:
        view: the `KVView`.
    """

    __slots__ = ("view",)

    def __init__(self, view: KVView):
        self.view = view

    def _tensor(self) -> torch.Tensor:
        return self.view.tensors()[1]

    @property
    def _new(self) -> torch.Tensor:
        return self.view.new_v

    @property
    def _n_rows(self) -> int:
        return self.view.n_kept
