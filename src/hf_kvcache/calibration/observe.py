"""Moments of keys, values, queries and gradients, seen by a cache that keeps nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy

from hf_kvcache.cache import KVCache
from hf_kvcache.codecs.basis import Basis, by_group
from hf_kvcache.codecs.fitting import Moments
from hf_kvcache.codecs.lowrank import LowRank
from hf_kvcache.compat import cache_argument
from hf_kvcache.former_names import argument
from hf_kvcache.layer import KVLayer
from hf_kvcache.layer_context import LayerContext
from hf_kvcache.sharded_model import refuse_shards
from hf_kvcache.text_positions import cover
from hf_kvcache.view import KVView

BasisOf = Callable[[int, str], Basis | None]
N_SINK = 4  # first tokens of a text, which a low-rank cache leaves dense


@dataclass
class LayerMoments:
    """What was seen of one attention layer.

    Attributes:
        rows: moments of keys ("k") and values ("v") by group of heads, `[G, s * D]`.
        gradients: the same of the gradients of the loss with respect to them; empty unless asked for.
        queries: moments of the queries of each KV head `[Hkv, D]`.
    """

    rows: dict[str, Moments] = field(default_factory=dict)
    gradients: dict[str, Moments] = field(default_factory=dict)
    queries: Moments | None = None


class Passing(KVLayer):
    """A layer that keeps nothing: attention sees the rows of the call, or what bases make of them."""

    needs_model = True

    def __init__(self, layer_idx: int, basis_of: BasisOf | None = None, rope: str = "pre", n_sink: int = N_SINK):
        super().__init__(layer_idx)
        self._basis_of, self._kind, self._n_sink = basis_of, rope, n_sink
        self._projections: dict[str, LowRank] = {}

    def append(self, k, v):
        self._check(k, v)
        self.tokens_seen = k.shape[2]
        self._view = KVView(self, k, v, is_prefill=True)
        return self._view

    def bind(self, context: LayerContext) -> None:
        self.rope = context.rope() if self._kind == "pre" else None
        for side in "kv" if self._basis_of is not None else "":
            basis = self._basis_of(self.layer_idx, side)
            if basis is not None:
                placed = basis.placed(basis.rank, False, self.dtype, self.device)
                codec = LowRank(basis.rank, basis.group_size, self._kind, basis=placed)
                self._projections[side] = codec.for_side(side).for_model(context)

    def prepare(self, call):
        positions = call.position_ids
        if positions is None:
            positions = torch.arange(call.n_new, device=self.device).unsqueeze(0)
        self._positions = positions.unsqueeze(1).int()
        self._is_sink = (self._positions < self._n_sink).unsqueeze(-1)
        self._is_real = call.is_real
        cover(self, positions)
        self._project()

    def _project(self) -> None:
        for side, name in (("k", "new_k"), ("v", "new_v")):
            rows = getattr(self._view, name)
            self.see(side, rows)
            if side in self._projections:
                codec = self._projections[side]
                encoded = codec.encode(rows, None, self._positions)
                made = codec.decode(encoded, rows.dtype, self.head_dim, self._positions)
                rows = torch.where(self._is_sink, rows, made)
                setattr(self._view, name, rows)
            self.show(side, rows)

    def see(self, side: str, rows: torch.Tensor) -> None:
        """Called with the model's own rows."""

    def show(self, side: str, rows: torch.Tensor) -> None:
        """Called with the rows that attention will see."""

    def compress(self, call):
        self.tokens_seen = 0
        # a hook on the gradient of its rows may hold the layer, and no garbage collector sees that circle
        del self._view


class _Watcher(Passing):
    """A layer that counts its rows and forgets them."""

    def __init__(self, layer_idx, basis_of, rope: str, n_sink: int, group_sizes: dict[str, int | str]):
        super().__init__(layer_idx, basis_of, rope, n_sink)
        self.seen = LayerMoments()
        self._group_sizes = group_sizes

    def _project(self):
        counted = ~self._is_sink[:, 0, :, 0].expand(self.batch_size, -1)
        self._is_real = counted if self._is_real is None else counted & self._is_real
        super()._project()

    def see(self, side, rows):
        self._count(self.seen.rows, side, rows)

    def show(self, side, rows):
        if rows.requires_grad:
            rows.register_hook(lambda gradient: self._count(self.seen.gradients, side, gradient))

    def compress(self, call):
        queries = self._before_rope(call.query.detach()).unflatten(1, (self.n_kv_heads, -1))
        queries = queries.transpose(1, 2)  # [B, G, Hkv, S, D]
        if self.seen.queries is None:
            self.seen.queries = self._moments(self.n_kv_heads, self.head_dim)
        for heads in queries.unbind(1):
            self.seen.queries.add(heads.transpose(0, 1)[:, self._is_real])
        super().compress(call)

    def _count(self, into, side, rows):
        rows = rows.detach()
        # the gradient of a rotated key, rotated back, is the gradient of the key before rotation, up to the scaling
        rows = self._before_rope(rows) if side == "k" else rows.float()
        group_size = self._group_sizes[side]
        rows = by_group(rows, self.n_kv_heads if group_size == "all" else group_size).transpose(0, 1)  # [G, B, n, s*D]
        if side not in into:
            into[side] = self._moments(rows.shape[0], rows.shape[3])
        into[side].add(rows[:, self._is_real])

    def _before_rope(self, rows):
        return rows.float() if self.rope is None else self.rope.unrotate(rows, self._positions)

    def _moments(self, n_groups, width):
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return Moments(n_groups, width, self.device, dtype)


class Through(KVCache):
    """A cache that lets a forward pass through layers of one kind."""

    def __init__(self, kind: type[Passing], *arguments):
        super().__init__()
        self._kind, self._arguments = kind, arguments

    def _new_layer(self, layer_idx):
        return self._hf_layer(layer_idx) or self._kind(layer_idx, *self._arguments)


@torch.no_grad()
def logits_behind(
    model: torch.nn.Module, ids: torch.Tensor, basis_of: BasisOf, rope: str, n_sink: int = N_SINK
) -> torch.Tensor:
    """Logits `[B, T, vocabulary]` where attention sees what bases make of all rows but the first `n_sink`."""
    cache = Through(Passing, basis_of, rope, n_sink)
    return model(ids.to(model.device), **cache_argument(cache), use_cache=True).logits


@argument("n_skip", "n_sink")
def observe(
    model: torch.nn.Module,
    batches: Iterable[torch.Tensor],
    *,
    rope: str = "pre",
    group_sizes: dict[str, int | str],
    with_gradients: bool = False,
    n_sink: int = N_SINK,
    basis_of: BasisOf | None = None,
    weights: Iterable[torch.nn.Parameter] = (),
    on_batch: Callable[[], None] = lambda: None,
) -> dict[int, LayerMoments]:
    """Run texts through a model and count what its full-attention layers produce.

    Args:
        model: causal language model; weights are not changed.
        batches: token ids `[B, T]`.
        rope: whether keys are counted before RoPE ("pre") or after it ("post").
        group_sizes: KV heads per group, by side "k" and "v".
        with_gradients: also run backward, for the moments of the gradients (labels are the next tokens).
        n_sink: first tokens of a text, which are not counted, nor changed by bases, as a cache leaves its sinks dense.
        basis_of: the basis of a layer and side behind which attention sees the rows; they are counted as they were.
        weights: parameters that get gradients, too (those of every batch are added up in `.grad`).
        on_batch: called after every batch.

    Returns:
        Moments by layer index.

    Raises:
        ValueError: several processes share the model.
    """
    refuse_shards(model, "calibration")
    observer = Through(_Watcher, basis_of, rope, n_sink, group_sizes)
    with _frozen(model, weights), torch.set_grad_enabled(with_gradients):
        for ids in batches:
            ids = ids.to(model.device)
            embedded = model.get_input_embeddings()(ids)
            if with_gradients:
                # weights are frozen: gradients flow to keys and values because the input asks for one
                embedded = embedded.detach().requires_grad_()
            logits = model(inputs_embeds=embedded, **cache_argument(observer), use_cache=True).logits
            if with_gradients:
                cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
            on_batch()
    return {i: layer.seen for i, layer in enumerate(observer.layers) if isinstance(layer, _Watcher)}


class _frozen:
    """No weight but `others` asks for a gradient inside the block; the model is in evaluation mode."""

    def __init__(self, model, others):
        self.model, self.others = model, list(others)

    def __enter__(self):
        self.asked = [(p, p.requires_grad) for p in self.model.parameters()]
        self.was_training = self.model.training
        self.model.eval().requires_grad_(False)
        for parameter in self.others:
            parameter.requires_grad_()

    def __exit__(self, *exc):
        for parameter, asked in self.asked:
            parameter.requires_grad_(asked)
        self.model.train(self.was_training)
