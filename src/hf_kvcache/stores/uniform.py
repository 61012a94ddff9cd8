"""The store in which every head keeps the same number of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hf_kvcache.stores.base import Store
from hf_kvcache.stores.buffer import RowBuffer

if TYPE_CHECKING:
    from hf_kvcache.codecs.base import Codec
    from hf_kvcache.codecs.fitted import FittedCodec

PACK_STEP = 32  # rows are packed in steps, so that packing costs a launch per 32 tokens, not per token
QUERIES = 32  # newest queries that codecs ask for
SPARE_QUERIES = 8  # more than wanted are held, so that a `crop` of drafts leaves enough and few steps move them


class UniformStore(Store):
    """Packed rows, then dense rows: the attention sinks and the recent window.

    Args:
        keys: codec of packed keys, or None for a store that stays dense.
        values: codec of packed values, or None.
        window: newest rows that stay dense.
        n_sink: oldest rows that stay dense.
        min_length: rows below which nothing is packed.
        tracked: per-row state that follows the rows, name -> dtype.
        max_length: rows to make room for at once, instead of growing.
        n_queries: newest queries that a policy asks for.
    """

    is_ragged = False
    shares_layers = False  # whether packed rows are those of several layers
    is_decoding = False  # whether a single token brought the newest rows: nothing may wait for a device then

    def __init__(
        self,
        keys: Codec | None = None,
        values: Codec | None = None,
        *,
        window: int = 64,
        n_sink: int = 0,
        min_length: int = 0,
        tracked: dict[str, torch.dtype] | None = None,
        max_length: int | None = None,
        n_queries: int = 0,
    ):
        self.keys, self.values = keys, values
        self.window, self.n_sink, self.min_length, self.max_length = window, n_sink, min_length, max_length
        self.tracked = dict(tracked or {})
        self.wide: set[str] = set()  # what is tracked as a row of the keys' width
        sides = [] if keys is None else [("k", keys), ("v", values)]
        needs = frozenset().union(*(codec.needs for _, codec in sides))
        self.needs_queries, self.needs_positions = "queries" in needs, "positions" in needs
        self.n_queries = max(n_queries, QUERIES if self.needs_queries else 0)
        # positions in RoPE, the same for all heads, -1 for padding: a codec that is fitted to rows asks which are real
        self.has_position_ids = bool(needs & {"positions", "model"})
        state = dict.fromkeys(self.tracked, 1)
        self.dense = RowBuffer({"k": 1, "v": 1, **state} | ({"position_ids": 1} if self.has_position_ids else {}))
        fields = {f"{side}.{name}": per_row for side, codec in sides for name, per_row in codec.fields.items()}
        position_ids = {"position_ids": 1} if self.needs_positions else {}
        self.packed = RowBuffer({**fields, **state, **position_ids} if sides else {})
        self.queries = RowBuffer({"q": 1})
        self.layer_state = RowBuffer({})
        self.step = max(PACK_STEP, self.packed.unit)
        self.dtype: torch.dtype | None = None
        self.owns_storage = True

    @property
    def n_packed(self) -> int:
        return self.packed.n_tokens

    @property
    def n_kept(self) -> int:
        return self.packed.n_tokens + self.dense.n_tokens

    @property
    def positions(self) -> torch.Tensor | None:
        return self.state("position") if "position" in self.tracked else None

    def state(self, name: str) -> torch.Tensor:
        """Tracked per-row state `[B, Hkv, N]` in view order (a copy where some rows are packed)."""
        parts = [buffer[name] for buffer in (self.packed, self.dense) if buffer.n_tokens]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def append(self, k: torch.Tensor, v: torch.Tensor, state: dict[str, torch.Tensor | float] | None = None) -> None:
        """Add rows `[B, Hkv, n, D]` to the dense tail.

        Args:
            k, v: the rows.
            state: what is tracked of them by name, `[B | 1, Hkv | 1, n, ...]`, or one number for all; zero by default.
        """
        self.dtype, self.owns_storage = k.dtype, self.dense.n_tokens > 0 or self.packed.n_tokens > 0
        self.is_decoding = k.shape[2] == 1
        rows = {"k": k, "v": v}
        if self.tracked:
            rows |= dict.fromkeys(self.tracked, 0) | (state or {})
        if self.has_position_ids:
            rows["position_ids"] = 0
        if not self.dense.tensors:
            rows |= self._first_state(k, rows)
        self.dense.append(rows, k.shape[2])

    def _first_state(self, k: torch.Tensor, rows: dict) -> dict[str, torch.Tensor]:
        """What is tracked of the first rows, as tensors, which say how large state is."""
        shapes = {name: k.shape if name in self.wide else k.shape[:3] for name in self.tracked}
        shapes |= {"position_ids": (k.shape[0], 1, k.shape[2])} if self.has_position_ids else {}
        first = {}
        for name, shape in shapes.items():
            first[name] = torch.empty(shape, dtype=self.tracked.get(name, torch.int32), device=k.device)
            first[name][...] = rows[name]
        return first

    def track(self, name: str, dtype: torch.dtype) -> None:
        """Track state as wide as keys, `[B, Hkv, n, D]`, from now on; called before there are rows, or with those."""
        self.tracked[name] = dtype
        self.wide.add(name)
        self.dense.tokens_per_row[name] = 1

    def untrack(self, name: str) -> None:
        """Track something no longer that `track` began with; called while there are no rows."""
        del self.tracked[name], self.dense.tokens_per_row[name]
        self.wide.discard(name)

    def set_state(self, name: str, values: torch.Tensor) -> None:
        """Overwrite tracked per-row state, `[B, Hkv, N]` in view order."""
        n = self.n_packed
        if n:
            self.packed[name].copy_(values[..., :n])
        if self.dense.n_tokens:
            self.dense[name].copy_(values[..., n:])

    def set_layer_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Hold `[B, Hkv, 1, ...]` tensors that belong to the layer, not to its rows, instead of those held."""
        self.layer_state.clear()
        self.layer_state.tokens_per_row = dict.fromkeys(tensors, 1)
        self.layer_state.append(tensors, 1)

    def note_queries(self, q: torch.Tensor) -> None:
        """Remember the newest of the queries `[B, Hq, S, D]` for codecs and policies that need them."""
        if not self.n_queries:
            return
        least = self.n_queries + SPARE_QUERIES
        q = q[:, :, -least:] if q.shape[2] > least else q
        newest = q.unflatten(1, (self.dense.tensors["k"].shape[1], -1)).transpose(2, 3)  # [B, Hkv, S, G, D]
        if not self.queries.tensors:
            # an empty buffer adopts what it is given, and this may be a slice of the model's activations
            newest = newest.clone(memory_format=torch.contiguous_format)
        self.queries.append({"q": newest}, newest.shape[2])
        if self.queries.n_tokens > least + SPARE_QUERIES:
            self.queries.remove(0, self.queries.n_tokens - least)

    def newest_queries(self, n: int) -> torch.Tensor:
        """The newest `n` queries `[B, Hkv, n, G, D]`, or as many as there are."""
        return self.queries["q"][:, :, -n:]

    @property
    def n_fixed(self) -> int:
        """Rows at the end of the view that `keep` must keep."""
        # dense rows are fixed once others are packed: the same number of packed rows goes from every head
        return self.dense.n_tokens if self.n_packed else 0

    def keep(self, indices: torch.Tensor) -> None:
        if self.n_packed:
            n_packed = indices.shape[2] - self.dense.n_tokens
            self.packed.gather(indices[..., :n_packed])
        else:
            self.dense.gather(indices)
            self.owns_storage = True

    def rotate_keys(self, rotate, by: torch.Tensor, source: str = "k") -> None:
        """Replace dense keys by `rotate(rows, by)`, `by` being `[B, Hkv, N]` in view order.

        `source` names the rows: the keys themselves, or what is tracked beside them.
        """
        self.dense["k"].copy_(rotate(self.dense[source], by[:, :, self.n_packed :]))

    def pack(self) -> None:
        surplus = self.dense.n_tokens - self.n_sink - self.window
        if self.keys is None or surplus < self.step or not self._can_pack():
            if not self.owns_storage:
                self._copy_storage()
            return
        self.fit()
        n = surplus // self.step * self.step
        start, stop = self.n_sink, self.n_sink + n
        rows = self._encoded_rows(start, stop)
        is_first = not self.packed.tensors
        self.packed.append(rows, n)
        if is_first and self.max_length is not None:
            self.packed.reserve(self.max_length - self.n_sink - self.window)
        self._drop(start, stop)

    def _can_pack(self) -> bool:
        # a crop may have taken every query that a rule would go by; the next call brings new ones
        if self.needs_queries and not self.queries.n_tokens:
            return False
        return bool(self.n_packed) or self.n_kept >= max(self.min_length, self.rows_to_fit)

    def _encoded_rows(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """What the packed buffer holds of the dense rows `[start, stop)`: codes, tracked state, positions."""
        queries = self.newest_queries(QUERIES) if self.needs_queries else None
        rows = {name: self.dense[name][:, :, start:stop].clone() for name in self.tracked}
        position_ids = self.dense["position_ids"][:, :, start:stop].clamp(min=0) if self.needs_positions else None
        rows |= {} if position_ids is None else {"position_ids": position_ids}
        for side, codec in (("k", self.keys), ("v", self.values)):
            encoded = self._encode(codec, side, start, stop, queries, position_ids)
            rows |= {f"{side}.{name}": t for name, t in encoded.items()}
        return rows

    def _encode(self, codec: Codec, side: str, start: int, stop: int, queries, position_ids) -> dict[str, torch.Tensor]:
        """The dense rows `[start, stop)` of one side, encoded."""
        return codec.encode(self.dense[side][:, :, start:stop], queries, position_ids)

    def _drop(self, start: int, stop: int) -> None:
        """Free the dense rows `[start, stop)`, which are packed now."""
        left = self.dense.n_tokens - (stop - start)
        steady = max(self.n_sink + self.window + self.step, left)
        self.dense.remove(start, stop, capacity=None if self.owns_storage and self.dense.capacity <= steady else steady)
        self.owns_storage = True

    def fit(self) -> None:
        """Show the rows there are to codecs that have to see some before they can encode any."""
        if not self.is_unfitted:
            return
        start = min(self.n_sink, self.dense.n_tokens - 1)
        position_ids = self.dense["position_ids"][:, :, start:]
        # heads may have kept different rows: padding is what is padding for all of them
        is_real = (position_ids >= 0).any(1)
        for side, part in self.fitted_parts.items():
            if part.is_unfitted:
                part = part.fitted(self.dense[side[0]][:, :, start:], position_ids.clamp(min=0), is_real)
                setattr(self, side, getattr(self, side).with_fitted_part(part))

    def project(self, n_new: int) -> None:
        """Let the newest `n_new` rows be what packing will make of them."""
        if self.keys is None:
            return
        self.fit()
        position_ids = self.dense["position_ids"][:, :, -n_new:].clamp(min=0) if self.needs_positions else None
        for side, codec in (("k", self.keys), ("v", self.values)):
            rows = self.dense[side][:, :, -n_new:]
            encoded = codec.encode(rows, None, position_ids)
            rows.copy_(codec.decode(encoded, rows.dtype, rows.shape[-1], position_ids))

    def on_bound(self, cache, layer_idx: int) -> None:
        """Codecs of the layer have got from the model what they need: called once per text."""

    @property
    def fitted_parts(self) -> dict[str, FittedCodec]:
        """What is fitted of the codecs of "keys" and "values", of those sides where something is."""
        codecs = {} if self.keys is None else {"keys": self.keys, "values": self.values}
        return {side: codec.fitted_part for side, codec in codecs.items() if codec.fitted_part is not None}

    @property
    def is_unfitted(self) -> bool:
        return any(part.is_unfitted for part in self.fitted_parts.values())

    @property
    def rows_to_fit(self) -> int:
        """Rows that an unfitted codec waits for: twice as many as it has directions to find."""
        unfitted = [part for part in self.fitted_parts.values() if part.is_unfitted]
        head_dim = self.dense.tensors["k"].shape[-1] if unfitted else 0
        return max((2 * part.heads_per_row * head_dim for part in unfitted), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes allocated: rows, spare rows, metadata, and constants that were made for this cache."""
        made_here = [side for side, part in self.fitted_parts.items() if part.constants_in_cache]
        constants = [t for side in made_here for t in self.constants(side).values()]
        return super().nbytes + sum(t.untyped_storage().nbytes() for t in constants)

    def constants(self, side: str) -> dict[str, torch.Tensor]:
        """What packed rows cannot be decoded without, of the "keys" or the "values", as far as this store holds it."""
        part = self.fitted_parts.get(side)
        return {} if part is None else part.constants()

    def _copy_storage(self) -> None:
        """Leave the tensors that were adopted from the model for storages of our own."""
        if self.max_length is not None and self.keys is None:
            self.dense.reserve(self.max_length)
        else:
            self.dense.copy_storage()
        self.owns_storage = True

    def crop(self, n_tokens: int) -> None:
        if n_tokens > self.dense.n_tokens - min(self.n_sink, self.dense.n_tokens) and self.n_packed:
            self._unpack(n_tokens - (self.dense.n_tokens - self.n_sink))
        self.dense.truncate(max(self.dense.n_tokens - n_tokens, 0))
        self.queries.truncate(max(self.queries.n_tokens - n_tokens, 0))

    def _unpack(self, n_tokens: int) -> None:
        """Bring at least the newest `n_tokens` packed rows back into the dense tail, decoded."""
        unit = self.packed.unit
        n = min(-(-n_tokens // unit) * unit, self.n_packed)
        start = self.n_packed - n
        self._restore(start)
        self.packed.truncate(start)

    def _restore(self, start: int) -> None:
        """Decode the packed rows from `start` on into the dense tail."""
        n = self.n_packed - start
        k, v = self.rows(start, self.n_packed)
        back = {"k": k, "v": v}
        back |= {name: self.packed[name][:, :, start:] for name in self.tracked}
        if self.has_position_ids:
            source = self.packed["position_ids"][:, :, start:] if self.needs_positions else k.new_zeros(1, 1, 1).int()
            back["position_ids"] = source.expand(k.shape[0], -1, n)
        after = {name: t[:, :, self.n_sink :].clone() for name, t in self.dense.views().items()}
        n_after = self.dense.n_tokens - self.n_sink
        self.dense.truncate(self.n_sink)
        self.dense.append(back, n)
        self.dense.append(after, n_after)

    def buffers(self) -> dict[str, RowBuffer]:
        return {"packed": self.packed, "dense": self.dense, "queries": self.queries, "layer_state": self.layer_state}

    def encoded(self, side: str) -> dict[str, torch.Tensor]:
        """Packed tensors of one side, "k" or "v", under the codec's own names."""
        n, tensors, fields = self.packed.n_tokens, self.packed.tensors, self.codec_of(side).fields
        return {name: tensors[f"{side}.{name}"].narrow(2, 0, n // of_row) for name, of_row in fields.items()}

    def codec_of(self, side: str) -> Codec | None:
        """The codec of one side, "k" or "v"."""
        return self.keys if side == "k" else self.values

    def width(self, side: str) -> int:
        """Channels of a row of one side, "k" or "v"."""
        return self.dense.tensors[side].shape[-1]

    def rows(self, start: int, stop: int, sides: str = "kv") -> tuple[torch.Tensor, ...]:
        """Packed rows `[start, stop)`, decoded: `[B, Hkv, stop - start, D]` of each side in the dtype of the cache."""
        return tuple(self._decoded(side, start, stop) for side in sides)

    def _decoded(self, side: str, start: int, stop: int) -> torch.Tensor:
        codec, encoded = self.codec_of(side), self.encoded(side)
        position_ids = self.packed["position_ids"][:, :, start:stop] if self.needs_positions else None
        part = {
            name: t[:, :, start // of_row : -(-stop // of_row)]
            for (name, t), of_row in zip(encoded.items(), codec.fields.values())
        }
        return codec.decode(part, self.dtype, self.width(side), position_ids)

    def logical_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything, dense and in the order of the positions: K and V `[B, Hkv, N, D]`."""
        dense = self.dense["k"], self.dense["v"]
        if not self.n_packed:
            return dense
        packed = self.rows(0, self.n_packed)
        sinks, tail = slice(0, self.n_sink), slice(self.n_sink, None)
        return tuple(torch.cat([d[:, :, sinks], p, d[:, :, tail]], 2) for p, d in zip(packed, dense))

    def to_view_order(self, mask: torch.Tensor) -> torch.Tensor:
        """Reorder the last axis of `mask` `[..., N]` from the order of positions to view order."""
        if not (self.n_sink and self.n_packed):
            return mask
        sinks, packed, tail = mask.split([self.n_sink, self.n_packed, self.n_kept - self.n_sink - self.n_packed], -1)
        return torch.cat([packed, sinks, tail], -1)

    def blocks(self, size: int, sides: str = "kv"):
        unit = self.packed.unit
        size = max(size // unit, 1) * unit
        for start in range(0, self.n_packed, size):
            yield self.rows(start, min(start + size, self.n_packed), sides)
        for start in range(0, self.dense.n_tokens, size):
            yield tuple(self.dense[side][:, :, start : start + size] for side in sides)
