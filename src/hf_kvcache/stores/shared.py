"""The store of a layer that shares its packed rows with its neighbours."""

from __future__ import annotations

import torch

from hf_kvcache.codecs.base import Codec
from hf_kvcache.codecs.chain import Chain
from hf_kvcache.codecs.fitted import layers_per_row, refit
from hf_kvcache.codecs.fitting import Moments
from hf_kvcache.codecs.joint import fit_jointly
from hf_kvcache.codecs.lowrank import CHUNK, LowRank
from hf_kvcache.stores.buffer import RowBuffer
from hf_kvcache.stores.uniform import UniformStore


class SharedStore(UniformStore):
    """One latent row per token for a group of layers (xKV, arXiv 2503.18893), and a dense tail for each of them.

    The layers of a group read one buffer of packed rows, which the first of them, the leader, answers for; each has
    its own directions in which it reads them. Rows are packed when the last layer of the group compresses: all of them
    are there then. A store outside a group stays dense.
    """

    shares_layers = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.group: list[SharedStore] = []
        self.n_layers = 0

    def join(self, leader: SharedStore, n_layers: int) -> None:
        """Enter the group of `leader` (which enters first), one of `n_layers` in the order of the model."""
        self.group, self.packed, self.n_layers = leader.group, leader.packed, n_layers
        self.group.append(self)

    def on_bound(self, cache, layer_idx: int) -> None:
        """Join the group of this layer: neighbours among the layers with the same codec.

        Raises:
            ValueError: they lie on different devices.
        """
        if self.group:
            return
        sharing = cache.layers_with_codec()
        place, most = sharing.index(layer_idx), layers_per_row(self.keys)
        group = sharing[place - place % most :][:most]
        devices = {cache.layers[i].device for i in group[: group.index(layer_idx) + 1]}
        if len(devices) > 1:
            raise ValueError(
                f"layers {group[0]} to {layer_idx} share rows, and lie on {' and '.join(sorted(map(str, devices)))}; "
                "place them on one device, or use a smaller share_layers"
            )
        self.join(cache.layers[group[0]].store, len(group))

    @property
    def is_leader(self) -> bool:
        return not self.group or self is self.group[0]

    def lowrank(self, side: str) -> LowRank:
        """The low-rank codec of one side, whatever follows it."""
        return (self.keys if side == "k" else self.values).fitted_part

    def pack(self) -> None:
        if len(self.group) == self.n_layers > 0 and self is self.group[-1]:
            super().pack()
        elif not self.owns_storage:
            self._copy_storage()

    def fit(self) -> None:
        """Find the directions of the rows there are, for all layers of the group at once."""
        if not self.is_unfitted:
            return
        start = min(self.n_sink, self.dense.n_tokens - 1)
        for side, which in (("k", "keys"), ("v", "values")):
            first = self.lowrank(side)
            parts = fit_jointly(
                self._moments(side, start),
                [store._heads(side) for store in self.group],
                first.rank_within(self._width(side)),
                is_mixed=bool(first.mix),
                centre=first.centre,
                dtype=self.dtype,
            )
            for store, part in zip(self.group, parts, strict=True):
                codec = getattr(store, which)
                setattr(store, which, refit(codec, lambda old, new=part.tensors: old.with_constants(new)))

    @property
    def rows_to_fit(self) -> int:
        """Rows to see before directions are chosen for good: as many as there are channels to choose among.

        At a high rank the basis would take more than is saved: then until it does not, at most twice that.
        """
        if not self.is_unfitted:
            return 0
        least = 0
        for side in "kv":
            width = self._width(side)
            rank = self.lowrank(side).rank_within(width)
            least = max(least, width, min(rank * width // max(width - rank, 1), 2 * width))
        return least

    def buffers(self) -> dict[str, RowBuffer]:
        own = super().buffers()
        return own if self.is_leader else {name: buffer for name, buffer in own.items() if name != "packed"}

    def constants(self, side: str) -> dict[str, torch.Tensor]:
        own = super().constants(side)
        return own if self.is_leader else {name: t for name, t in own.items() if name != "down"}

    def _encode(self, codec: Codec, side: str, start: int, stop: int, queries, position_ids) -> dict[str, torch.Tensor]:
        chunks = []
        for at in range(start, stop, CHUNK):
            rows = slice(at, min(at + CHUNK, stop))
            where = None if position_ids is None else position_ids[:, :, rows.start - start : rows.stop - start]
            # float32, because the parts are rounded once they have been added up
            parts = (s.lowrank(side).encode(s.dense[side][:, :, rows].float(), None, where) for s in self.group)
            chunks.append(sum(part["latents"] for part in parts).to(self.dtype))
        return _followed(codec, {"latents": torch.cat(chunks, 2)})

    def _drop(self, start: int, stop: int) -> None:
        for store in self.group:
            super(SharedStore, store)._drop(start, stop)

    def _restore(self, start: int) -> None:
        for store in self.group:
            super(SharedStore, store)._restore(start)

    def _heads(self, side: str) -> tuple[int, int]:
        """`(Hkv, D)`."""
        return self.dense.tensors[side].shape[1], self.dense.tensors[side].shape[3]

    def _width(self, side: str) -> int:
        """Channels of all layers of the group."""
        return sum(n_heads * head_dim for n_heads, head_dim in (store._heads(side) for store in self.group))

    def _moments(self, side: str, start: int) -> Moments:
        """Moments of the group's rows from `start` on, as its codecs see them, without padding and broken tokens."""
        moments = Moments(1, self._width(side), self.dense[side].device)
        for at in range(start, self.dense.n_tokens, CHUNK):
            span = slice(at, min(at + CHUNK, self.dense.n_tokens))
            position_ids = self.dense["position_ids"][:, :, span]
            parts = (s.lowrank(side).grouped(s.dense[side][:, :, span], position_ids.clamp(min=0)) for s in self.group)
            rows = torch.cat(list(parts), 3)[:, 0]  # [B, n, W]
            moments.add(rows[(position_ids[:, 0] >= 0) & rows.isfinite().all(-1)].unsqueeze(0))
        return moments


def _followed(codec: Codec, encoded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the codecs behind the first one make of what it has encoded."""
    return codec.encode_payload(_followed(codec.first, encoded)) if isinstance(codec, Chain) else encoded


def check_sharing(cache, offloading: bool) -> None:
    """Refuse what layers that share their packed rows cannot do."""
    if any(layers_per_row(side) > 1 for side in cache.edge_codec or ()):
        raise ValueError("edge_codec: the first and last layers are no neighbours, so they share no latents")
    if any("codec" in options for options in cache.per_layer.values()):
        raise ValueError("per_layer: layers that share rows have one codec; leave codec= of single layers out")
    if cache.codec is None or all(layers_per_row(side) == 1 for side in cache.codec):
        return
    keys, values = map(layers_per_row, cache.codec)
    if keys != values:
        raise ValueError(
            f"keys of {keys} layers and values of {values} would share rows: give both sides the same share_layers"
        )
    refused = {
        f"{type(cache.policy).__name__} drops tokens layer by layer": cache.policy is not None,
        "offloading moves layers one by one": offloading,
        "exact_prefill=False projects a layer before the next one has rows": not cache.exact_prefill,
    }
    for why, is_asked in refused.items():
        if is_asked:
            raise ValueError(f"share_layers={keys} keeps one row for several layers, but {why}")
