"""The store of a model that decides for itself: rows in pages, and what the next token needs to be merged or placed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hf_kvcache.codecs.base import Codec
from hf_kvcache.dmc.masks import FOREVER
from hf_kvcache.kernels.slot_step import place_rows, slot_step
from hf_kvcache.stores.buffer import RowBuffer
from hf_kvcache.stores.ragged import PAGE, RaggedStore

REFRESH = 32  # steps after which a device is asked to send the lengths


class TrainedStore(RaggedStore):
    """Rows in pages only: a decoded token takes the row of one that is not needed any more, or a new one.

    `layer_state` holds, per head, the ring of `slot_step`, and for DMC the newest members of the open segment.

    Args:
        keys, values: row-granular codecs whose rows serve any head; None means dense rows.
        page: rows per page.
    """

    def __init__(self, keys: Codec | None = None, values: Codec | None = None, *, page: int = PAGE):
        super().__init__(keys, values, page=page, window=0)
        # there is nothing beside the pages
        self.dense = RowBuffer({})
        self._n_since_look = 0

    @property
    def has_begun(self) -> torch.Tensor | None:
        """Which rows of the batch have seen a real token, boolean `[B]`; None when the store is new."""
        return None if self.packed.table is None else self.packed.lengths[:, 0] > 0

    def allocate(self, batch: int, n_heads: int, delay: int, device, dtype) -> None:
        """Make an empty store ready for a batch."""
        self.dtype = dtype
        self.packed.allocate(batch, n_heads, device)
        self.layer_state.tokens_per_row = {}
        self.put_layer_state({"pending": torch.full((batch, n_heads, delay + 1), -1, dtype=torch.int32, device=device)})

    def put_layer_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep these `[B, Hkv, ...]`, by name, in place of what was there."""
        for name, t in tensors.items():
            self.layer_state.tokens_per_row[name] = 1
            self.layer_state.tensors[name], self.layer_state.n_tokens = t.detach().contiguous().unsqueeze(2), 1

    @property
    def first(self) -> torch.Tensor | None:
        """Where every row of the batch begins, int64 `[B]` on the CPU; None if nobody has said."""
        held = self.layer_state.tensors.get("first")
        return None if held is None else held[:, 0, 0, 0].cpu().long()

    @property
    def pending(self) -> torch.Tensor:
        """See `slot_step`: int32 `[B, Hkv, delay + 1]`."""
        return self.layer_state.tensors["pending"][:, :, 0]

    # -- the open segment of DMC -------------------------------------------------------------------------------------

    def open_segment(self, side: str, like: torch.Tensor, window: int) -> torch.Tensor:
        """The newest members of the open segment of a side, in a ring `[B, Hkv, w, D]`; a float32 mean without one."""
        name = f"{side}.open_segment"
        if name not in self.layer_state.tensors:
            B, _, H, D = like.shape
            dtype = like.dtype if window else torch.promote_types(like.dtype, torch.float32)
            self.put_layer_state({name: torch.zeros(B, H, max(window, 1), D, dtype=dtype, device=like.device)})
        return self.layer_state.tensors[name][:, :, 0]

    def segment_weights(self, window: int, like: torch.Tensor) -> torch.Tensor:
        """Weights of those cells, float32 `[B, Hkv, w]`, zero for what is not part of the segment."""
        if "weights" not in self.layer_state.tensors:
            B, H = like.shape[:2]
            self.put_layer_state({"weights": torch.zeros(B, H, max(window, 1), dtype=like.dtype, device=like.device)})
        return self.layer_state.tensors["weights"][:, :, 0]

    # -- one token ---------------------------------------------------------------------------------------------------

    def place(
        self, k: torch.Tensor, v: torch.Tensor, alpha: torch.Tensor, is_real: torch.Tensor | None, position: int
    ) -> None:
        """Write one token's rows `[B, Hkv, 1, D]` where `slot_step` says.

        Args:
            alpha: its decisions, boolean `[B, Hkv]`.
            is_real: `[B]`, or None.
            position: in the text.
        """
        packed, rows = self.packed, self._encode_rows(k, v)
        if packed.is_at_hand:
            slot = slot_step(alpha, is_real, self.pending, packed.lengths, position)
            packed.follow_lengths(rows)
        else:
            # nobody waits for the device: pages are there for as many rows as there can be
            self._n_since_look += 1
            if self._n_since_look >= REFRESH:
                packed.expect()
                self._n_since_look = 0
            packed.make_room(rows)
            if self.keys.format == self.values.format == "dense":
                pages = [packed.tensors[name] for name in ("k.rows", "v.rows")]
                where = alpha, is_real, self.pending, packed.lengths, position, *pages, packed.table
                place_rows(rows["k.rows"], rows["v.rows"], *where)
                return
            slot = slot_step(alpha, is_real, self.pending, packed.lengths, position)
        packed.put(rows, slot)

    # -- many tokens -------------------------------------------------------------------------------------------------

    def cached_rows(self, position: int, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Rows of earlier tokens, dense, and how long they are seen: K and V `[B, Hkv, N, D]`, int32 `[B, Hkv, N]`.

        Args:
            position: of the first new token.
            alpha: its decisions, boolean `[B, Hkv]`.
        """
        if not self.packed.n_tokens:
            return None
        n_cells, packed = self.pending.shape[-1], self.packed
        k, v = self.rows(0, packed.n_tokens)
        until = torch.where(packed.is_row, FOREVER, -1).int()
        at = (position - 1 - torch.arange(n_cells, device=k.device)) % n_cells  # newest first
        cells = self._condemned(position, alpha)[..., at]
        last = (position - 1 - torch.arange(n_cells, device=k.device) + n_cells - 1).int()
        # cells without a condemned row write behind the end
        row = torch.where((cells >= 0) & (cells % 2 == 1), cells // 2, packed.n_tokens).long()
        until = torch.nn.functional.pad(until, (0, 1)).scatter(2, row, last.expand_as(cells))[..., :-1]
        return k, v, until

    def _condemned(self, position: int, alpha: torch.Tensor) -> torch.Tensor:
        """The ring with the first decision of a call, which is about the last token of the one before."""
        pending, before = self.pending.clone(), (position - 1) % self.pending.shape[-1]
        pending[..., before] |= (alpha & (pending[..., before] >= 0)).int()
        return pending

    def commit(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        seen_until: torch.Tensor,
        cached_until: torch.Tensor | None,
        position: int,
        alpha: torch.Tensor,
    ) -> None:
        """Take over new rows, and let go of those that the last query has not seen: as token by token.

        Args:
            k, v: `[B, Hkv, S, D]`.
            seen_until: last position at which a new row is seen, int32 `[B, Hkv, S]`.
            cached_until: the same of the rows that `cached_rows` returned.
            position: of the first new token.
            alpha: its decisions, boolean `[B, Hkv]`.
        """
        last = position + k.shape[2] - 1
        stays, n_cells = seen_until >= last, self.pending.shape[-1]
        shift = torch.zeros_like(self.packed.lengths).long()
        old = self._condemned(position, alpha)
        if cached_until is not None:
            kept = cached_until >= last
            # where a row that stays ends up
            rank = torch.nn.functional.pad(kept.cumsum(-1) - 1, (0, 1))
            row = torch.nn.functional.pad(torch.where(kept, rank[..., :-1], -1), (0, 1), value=-1)
            moved = row.gather(2, torch.where(old >= 0, old // 2, kept.shape[-1]).long())
            old = torch.where((old >= 0) & (moved >= 0), 2 * moved + old % 2, -1).int()
            self.packed.keep(kept)
            shift = self.packed.lengths.long()
        self.packed.append(self._encode_rows(k, v), stays)
        new_rows = torch.where(stays, shift.unsqueeze(-1) + stays.cumsum(-1) - 1, -1)
        condemned = (seen_until != FOREVER) & stays
        new = torch.where(new_rows >= 0, 2 * new_rows + condemned, -1).int()[..., -n_cells:]
        at = torch.arange(last + 1 - new.shape[-1], last + 1, device=k.device) % n_cells
        self.layer_state.tensors["pending"][:, :, 0] = old
        self.pending[..., at] = new

    def _encode_rows(self, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = {}
        for side, codec, x in (("k", self.keys, k), ("v", self.values, v)):
            rows |= {f"{side}.{name}": t for name, t in codec.encode(x, None, None).items()}
        return rows

    @property
    def n_kept(self) -> int:
        return self.packed.n_tokens

    @property
    def positions(self) -> None:
        return None

    def width(self, side: str) -> int:
        return self.head_dim

    def blocks(self, size: int, sides: str = "kv"):
        for start in range(0, self.packed.n_tokens, size):
            yield self.rows(start, min(start + size, self.packed.n_tokens), sides)

    def pack(self) -> None:
        """Nothing: rows are encoded as they come."""
