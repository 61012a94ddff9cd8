"""The store in which every head keeps as many rows as it likes."""

from __future__ import annotations

import torch

from hf_kvcache.codecs.base import Codec
from hf_kvcache.codecs.dense import Dense
from hf_kvcache.stores.paged import PagedBuffer
from hf_kvcache.stores.uniform import UniformStore

PAGE = 32  # rows: half of one is lost per head, and small pages cost the kernels little


class RaggedStore(UniformStore):
    """Rows in pages with a length per head, then a dense window that is the same for all heads.

    In *view order* heads are padded to the longest: `positions` are -1 behind the end of a head. Padding tokens are
    dropped on their way into a page.

    Args:
        keys, values: row-granular codecs whose rows serve any head; None means dense rows.
        page: rows per page, 16 to 64.
        other arguments: see `UniformStore`; sinks are the policy's.
    """

    is_ragged = True

    def __init__(self, keys: Codec | None = None, values: Codec | None = None, *, page: int = PAGE, **options):
        super().__init__(keys or Dense(), values or Dense(), **options)
        self.packed = PagedBuffer(self.packed.tokens_per_row, page)

    @property
    def n_fixed(self) -> int:
        return min(self.window, self.dense.n_tokens)

    def state(self, name: str) -> torch.Tensor:
        if not self.packed.n_tokens:
            return self.dense[name]
        packed = self.packed.read(name, fill=-1 if name == "position" else 0)
        return torch.cat([packed, self.dense[name]], 2)

    def set_state(self, name: str, values: torch.Tensor) -> None:
        n = self.packed.n_tokens
        if n:
            self.packed.write(name, values[..., :n])
        self.dense[name].copy_(values[..., n:])

    def keep(self, indices: torch.Tensor) -> None:
        """Keep the rows where `indices`, here boolean `[B, Hkv, N]`, says so, among those that have left the window."""
        n = self.packed.n_tokens
        if n:
            self.packed.keep(indices[..., :n], may_wait=not self.is_decoding)
        self._to_pages(self.dense.n_tokens - self.n_fixed, indices[..., n:])

    def all_stay(self, kept: torch.Tensor, positions: torch.Tensor) -> bool:
        """Whether no row goes; False, too, where a step of decoding would have to wait for a device to say so."""
        is_at_hand = positions.device.type == "cpu" and self.packed.is_at_hand
        return (is_at_hand or not self.is_decoding) and bool((kept | (positions < 0)).all())

    def track(self, name: str, dtype: torch.dtype) -> None:
        super().track(name, dtype)
        if name not in self.packed.fields:
            self.packed.fields += (name,)

    def untrack(self, name: str) -> None:
        super().untrack(name)
        self.packed.fields = tuple(field for field in self.packed.fields if field != name)

    def rotate_keys(self, rotate, by: torch.Tensor, source: str = "k") -> None:
        super().rotate_keys(rotate, by, source)
        n = self.packed.n_tokens
        if n:
            # without a codec the rows of pages are the keys themselves
            rows = self.packed.read("k.rows" if source == "k" else source)
            self.packed.write("k.rows", rotate(rows, by[..., :n]))

    def pack(self) -> None:
        surplus = self.dense.n_tokens - self.window
        is_blind = self.needs_queries and not self.queries.n_tokens
        if surplus >= self.step and not is_blind:
            self._to_pages(surplus // self.step * self.step)
        elif not self.owns_storage:
            self._copy_storage()

    def _to_pages(self, n: int, is_kept: torch.Tensor | None = None) -> None:
        """Move the oldest `n` dense rows to pages, or those of them that are kept, and drop the others."""
        if not n:
            return
        is_real = self.dense["position"][:, :, :n] >= 0
        is_kept = is_real if is_kept is None else is_real & is_kept[..., :n]
        self.packed.append(self._encoded_rows(0, n), is_kept, may_wait=not self.is_decoding)
        self._drop(0, n)

    def _copy_storage(self) -> None:
        self.dense.copy_storage()
        self.owns_storage = True

    def _unpack(self, n_tokens: int) -> None:
        """Bring the newest `n_tokens` packed rows of every head back into the dense tail, decoded."""
        packed = self.packed
        back = {name: packed.newest(name, n_tokens) for name in packed.fields}
        rows = {name: back[name] for name in self.tracked}
        for side, codec in (("k", self.keys), ("v", self.values)):
            encoded = {name: back[f"{side}.{name}"] for name in codec.fields}
            rows[side] = codec.decode(encoded, self.dtype, self.width(side))
        after = {name: t.clone() for name, t in self.dense.views().items()}
        n_after = self.dense.n_tokens
        self.dense.truncate(0)
        self.dense.append(rows, n_tokens)
        self.dense.append(after, n_after)
        packed.truncate_by(n_tokens)

    def encoded(self, side: str) -> dict[str, torch.Tensor]:
        """Pages of one side, "k" or "v", `[P, 1, page, ...]` under the codec's own names."""
        return {name: self.packed.tensors[f"{side}.{name}"] for name in self.codec_of(side).fields}

    def _decoded(self, side: str, start: int, stop: int) -> torch.Tensor:
        """Packed rows `[start, stop)` of every head, zeros behind the end of a head."""
        codec, is_row = self.codec_of(side), self.packed.is_row[..., start:stop].unsqueeze(-1)
        encoded = {name: self.packed.read(f"{side}.{name}", start, stop) for name in codec.fields}
        return codec.decode(encoded, self.dtype, self.width(side)).masked_fill(~is_row, 0)

    def logical_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything, dense: K and V `[B, Hkv, N, D]`, where all heads keep as many rows.

        Raises:
            ValueError: they do not.
        """
        self.packed.look()
        if self.packed.n_rows < self.packed.counts.numel() * self.packed.n_tokens:
            raise ValueError("heads keep different numbers of rows, which one dense tensor cannot hold")
        return super().logical_rows()
