"""Rows in pages: every head of every batch row has as many as it likes."""

from __future__ import annotations

from collections.abc import Callable

import torch

SLACK = 16  # spare pages when the pool has to grow, as a fraction of the pages in use
MIN_SLACK_PAGES = 2


class PagedBuffer:
    """Named tensors of pages `[P, 1, page, ...]`, a block table, and a length per (batch row, head).

    Row `i` of a head is row `i % page` of page `table[b, h, i // page]`. Eviction moves the rows that stay to the front
    of their head and frees the pages behind them, for other heads to use; when many are free, the pool shrinks.

    Args:
        fields: names of the tensors.
        page: rows per page.
    """

    unit = 1

    def __init__(self, fields, page: int = 64):
        self.fields, self.page = tuple(fields), page
        self.clear()

    def clear(self) -> None:
        """Forget everything and free the storages."""
        self.tensors: dict[str, torch.Tensor] = {}
        self.table = self.lengths = None
        # the same lengths where Python can look without waiting for the device, and the pages that nobody owns
        self.counts = torch.zeros(0, 0, dtype=torch.long)
        self.free: torch.Tensor | None = None
        # whether only the device knows the lengths: `counts` are then what they can be at most
        self.is_estimate = False

    @property
    def counts(self) -> torch.Tensor:
        """Rows of every head, int64 `[B, Hkv]` on the CPU."""
        return self._counts

    @counts.setter
    def counts(self, counts: torch.Tensor) -> None:
        # rows of the longest head, which every step asks for several times
        self._counts, self.n_tokens = counts, int(counts.max()) if counts.numel() else 0

    @property
    def n_rows(self) -> int:
        """Rows of all heads together."""
        return int(self.counts.sum())

    @property
    def n_pages(self) -> int:
        """Pages allocated, free ones included."""
        return next(iter(self.tensors.values())).shape[0] if self.tensors else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the storages: pages, free ones included, table, lengths and counts."""
        held = [] if self.table is None else [self.table, self.lengths, self.free, self.counts]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*self.tensors.values(), *held]
        }
        return sum(storages.values())

    # -- rows in and out ---------------------------------------------------------------------------------------------

    def append(self, rows: dict[str, torch.Tensor], is_kept: torch.Tensor | None = None) -> None:
        """Add rows `[B, Hkv, n, ...]` behind those of their heads: all of them, or where `is_kept` `[B, Hkv, n]`."""
        self.look()
        like = rows[self.fields[0]]
        if is_kept is None:
            is_kept = torch.ones(like.shape[:3], dtype=torch.bool, device=like.device)
        if self.table is None:
            self.allocate(*like.shape[:2], like.device)
        first = self.lengths.unsqueeze(-1)
        self._allot(self.counts + is_kept.sum(-1).cpu(), rows)
        at, source = self._address(first + is_kept.cumsum(-1) - 1)[is_kept], is_kept.flatten().nonzero().squeeze(1)
        for name in self.fields:
            self._flat(name)[at] = rows[name].flatten(0, 2)[source]

    def follow_lengths(self, like: dict[str, torch.Tensor]) -> None:
        """Bring pages and counts in line with `lengths`, which have been changed in place (on a CPU)."""
        counts = self.lengths.long()
        if (self._pages(counts) > self._pages(self.counts)).any() or not self.tensors:
            self._allot(counts, like)
        self.counts = counts

    def make_room(self, like: dict[str, torch.Tensor]) -> None:
        """Have a page for one more row of every head, whose lengths only the device knows; `counts` are what they can
        be at most.
        """
        counts, lengths = self.counts + 1, self.lengths
        if (self._pages(counts) > self._pages(self.counts)).any() or not self.tensors:
            self._allot(counts, like)
        self.counts, self.lengths, self.is_estimate = counts, lengths, True

    def look(self) -> None:
        """Wait for the device to say how long heads are, and take back the pages that they turned out not to need."""
        if self.is_estimate:
            self._allot(self.lengths.cpu().long())

    def put(self, rows: dict[str, torch.Tensor], slot: torch.Tensor, is_whole: bool) -> None:
        """Write rows `[B, Hkv, 1, ...]` at `slot` `[B, Hkv]` of their heads; where it is -1 nothing is written.

        Args:
            rows: by name.
            slot: int32.
            is_whole: whether none is -1.
        """
        at = self._address(slot.unsqueeze(-1))
        is_written = None if is_whole else slot.unsqueeze(-1) >= 0
        for name in self.fields:
            if is_whole:
                self._flat(name)[at.flatten()] = rows[name].flatten(0, 2)
            else:
                self._flat(name)[at[is_written]] = rows[name][is_written]

    def keep(self, is_kept: torch.Tensor) -> None:
        """Keep the rows where boolean `is_kept` `[B, Hkv, n_tokens]` and free the pages that this leaves empty."""
        is_kept = is_kept & self.is_row
        rank = is_kept.cumsum(-1) - 1
        # rows before the first one that goes stay where they are
        moves = is_kept & (rank != torch.arange(is_kept.shape[-1], device=rank.device))
        source, target = self._address(None)[moves], self._address(rank)[moves]
        for name in self.fields:
            flat = self._flat(name)
            flat[target] = flat[source]
        self._allot(is_kept.sum(-1).cpu())

    def truncate_by(self, n: int) -> None:
        """Drop the newest `n` rows of every head (or all it has)."""
        self.look()
        self._allot((self.counts - n).clamp(min=0))

    def read(self, name: str, start: int = 0, stop: int | None = None, fill: float = 0) -> torch.Tensor:
        """Rows `[start, stop)` of every head, `[B, Hkv, stop - start, ...]`, `fill` behind the end of a head."""
        stop = self.n_tokens if stop is None else stop
        index = torch.arange(start, stop, device=self.lengths.device)
        is_row = index < self.lengths.unsqueeze(-1)
        rows = self._flat(name)[self._address(index.expand(is_row.shape))]
        return rows.masked_fill_(~is_row.view(*is_row.shape, *[1] * (rows.dim() - 3)), fill)

    def newest(self, name: str, n: int) -> torch.Tensor:
        """The newest `n` rows of every head, which all have that many, `[B, Hkv, n, ...]`."""
        index = self.lengths.unsqueeze(-1) - n + torch.arange(n, device=self.lengths.device)
        return self._flat(name)[self._address(index)]

    def write(self, name: str, values: torch.Tensor) -> None:
        """Overwrite all rows by `[B, Hkv, n_tokens, ...]`; what stands behind the end of a head is ignored."""
        is_row = self.is_row
        self._flat(name)[self._address(None)[is_row]] = values[is_row].to(self.tensors[name].dtype)

    @property
    def is_row(self) -> torch.Tensor:
        """Which places of the padded form are rows, boolean `[B, Hkv, n_tokens]`."""
        return torch.arange(self.n_tokens, device=self.lengths.device) < self.lengths.unsqueeze(-1)

    # -- as other buffers --------------------------------------------------------------------------------------------

    def views(self) -> dict[str, torch.Tensor]:
        """The rows in use, head after head, `[n_rows, ...]` by name, and int64 "counts" `[B, Hkv]`."""
        if self.table is None:
            return {}
        self.look()
        at = self._address(None)[self.is_row]
        return {name: self._flat(name)[at] for name in self.fields} | {"counts": self.counts}

    def restore(self, views: dict[str, torch.Tensor], n_tokens: int) -> None:
        """Take over what `views` returned."""
        if not views:
            return
        # files may hold rows of more names than are known before the first row
        self.fields = tuple(name for name in views if name != "counts")
        rows = {name: views[name] for name in self.fields}
        device = rows[self.fields[0]].device
        counts = views["counts"].cpu()
        self.allocate(*counts.shape, device)
        self._allot(counts, {name: t[None, None] for name, t in rows.items()})
        at = self._address(None)[self.is_row]
        for name, t in rows.items():
            self._flat(name)[at] = t

    def map_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Select or repeat batch rows; what is repeated is copied."""
        if self.table is None:
            return
        self.look()
        held, counts = self.tensors, change(self.counts.to(self.table.device)).cpu()
        sources = change(self.table)
        self.allocate(*counts.shape, self.table.device)
        used = torch.arange(sources.shape[2]) < self._pages(counts).unsqueeze(-1)
        pages = sources[used.to(sources.device)].long()
        self.tensors = {name: t[pages] for name, t in held.items()}
        self._own_all(used, counts)

    def move(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Bring every tensor to another device."""
        if self.table is None:
            return
        self.tensors = {name: change(t) for name, t in self.tensors.items()}
        self.table, self.lengths, self.free = change(self.table), change(self.lengths), change(self.free)

    # -- pages -------------------------------------------------------------------------------------------------------

    def allocate(self, batch: int, n_heads: int, device) -> None:
        """Make an empty buffer ready for rows that come one by one."""
        self.table = torch.zeros(batch, n_heads, 0, dtype=torch.int32, device=device)
        self.counts = torch.zeros(batch, n_heads, dtype=torch.long)
        self.lengths = torch.zeros(batch, n_heads, dtype=torch.int32, device=device)
        self.free = torch.zeros(0, dtype=torch.int32, device=device)
        self.tensors = {}

    def _pages(self, counts: torch.Tensor) -> torch.Tensor:
        return (counts + (self.page - 1)) // self.page

    def _allot(self, counts: torch.Tensor, like: dict[str, torch.Tensor] | None = None) -> None:
        """Give every head the pages for `counts` `[B, Hkv]` rows, take back those beyond, and note the counts."""
        before, after = self._pages(self.counts), self._pages(counts)
        most = max(int(after.max()), self.table.shape[2])
        has, wants = (torch.arange(most) < n_pages.unsqueeze(-1) for n_pages in (before, after))
        takes = wants & ~has
        n_new = int(takes.sum())
        table = torch.nn.functional.pad(self.table, (0, most - self.table.shape[2]))
        self.free = torch.cat([self.free, table[(has & ~wants).to(table.device)]])
        if like is not None and not self.tensors:
            # rows that are all padding need no page, but those who look for rows a place to find none in
            self._grow(0, like)
        if n_new > self.free.shape[0]:
            self._grow(n_new - self.free.shape[0] + max(MIN_SLACK_PAGES, int(after.sum()) // SLACK), like)
        # the pages that were freed last go first
        n_left = self.free.shape[0] - n_new
        table[takes.to(table.device)], self.free = self.free[n_left:], self.free[:n_left].clone()
        self.table, self.counts, self.is_estimate = table, counts, False
        self.lengths = counts.to(device=table.device, dtype=torch.int32)
        spare = int(after.sum()) // SLACK + MIN_SLACK_PAGES
        if self.free.shape[0] > 2 * spare:
            self._shrink(spare)

    def _grow(self, n_pages: int, like: dict[str, torch.Tensor] | None) -> None:
        first = self.n_pages
        for name in self.fields:
            held = self.tensors.get(name)
            shape = like[name].shape[3:] if held is None else held.shape[3:]
            dtype = like[name].dtype if held is None else held.dtype
            fresh = torch.empty(first + n_pages, 1, self.page, *shape, dtype=dtype, device=self.table.device)
            if held is not None:
                fresh[:first] = held
            self.tensors[name] = fresh
        new = torch.arange(first, first + n_pages, dtype=torch.int32, device=self.table.device)
        self.free = torch.cat([new.flip(0), self.free])

    def _shrink(self, spare: int) -> None:
        """Copy the pages in use, head after head, to a pool of that size and `spare` pages."""
        used = torch.arange(self.table.shape[2]) < self._pages(self.counts).unsqueeze(-1)
        pages = self.table[used.to(self.table.device)].long()
        for name, held in self.tensors.items():
            fresh = torch.empty(pages.shape[0] + spare, *held.shape[1:], dtype=held.dtype, device=held.device)
            fresh[: pages.shape[0]] = held[pages]
            self.tensors[name] = fresh
        self._own_all(used, self.counts)

    def _own_all(self, used: torch.Tensor, counts: torch.Tensor) -> None:
        """Let heads own the first pages of the pool one after another, at the places of the table where `used`."""
        most = int(self._pages(counts).max()) if counts.numel() else 0
        table = torch.zeros(used.shape, dtype=torch.int32)
        n_used = int(used.sum())
        table[used] = torch.arange(n_used, dtype=torch.int32)
        device = self.lengths.device
        self.table = table[..., :most].contiguous().to(device)
        self.counts, self.lengths = counts, counts.to(device=device, dtype=torch.int32)
        self.free = torch.arange(n_used, self.n_pages, dtype=torch.int32, device=device).flip(0)

    def _flat(self, name: str) -> torch.Tensor:
        """A tensor as rows: `[P * page, ...]`."""
        return self.tensors[name].flatten(0, 2)

    def _address(self, index: torch.Tensor | None) -> torch.Tensor:
        """Where rows `index` `[B, Hkv, n]` of their heads lie among all; None means every place of the padded form."""
        if index is None:
            index = torch.arange(self.n_tokens, device=self.table.device).expand(*self.table.shape[:2], -1)
        index = index.clamp(min=0, max=max(self.table.shape[2] * self.page - 1, 0))
        if not self.table.shape[2]:
            return torch.zeros_like(index)
        return self.table.long().gather(2, index // self.page) * self.page + index % self.page
