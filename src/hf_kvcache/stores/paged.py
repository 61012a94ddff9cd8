"""Rows in pages: every head of every batch row has as many as it likes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_kvcache.transfers import Landing, sent_to

SLACK = 16  # spare pages when the pool has to grow, as a fraction of the pages in use
MIN_SLACK_PAGES = 1


class PagedBuffer:
    """Named tensors of pages `[P, 1, page, ...]`, a block table, and a length per (batch row, head).

    Row `i` of a head is row `i % page` of page `table[b, h, i // page]`. Eviction moves the rows that stay to the front
    of their head and frees the pages behind them, for other heads to use; when many are free, the pool shrinks.

    Page 0 is nobody's: what is no row is written there, so that the host need not know which rows are. What it knows is
    how long heads can be at most (`counts`). On a device that would have to be waited for they may be shorter
    (`is_estimate`), until the lengths have come over by themselves (`expect`), or somebody waits for them (`look`).

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
        # lengths on their way here, and the rows that every head may have got since they left
        self._landing: Landing | None = None
        self._n_since = 0

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
        """Pages allocated, free ones and the one that is nobody's included."""
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

    def append(self, rows: dict[str, torch.Tensor], is_kept: torch.Tensor | None = None, may_wait: bool = True) -> None:
        """Add rows `[B, Hkv, n, ...]` behind those of their heads.

        Args:
            rows: by name.
            is_kept: which of them are added, boolean `[B, Hkv, n]`; None for all.
            may_wait: for a device to say how many these are; otherwise there are pages for all.
        """
        like = rows[self.fields[0]]
        if self.table is None:
            self.allocate(*like.shape[:2], like.device)
        n, lengths = like.shape[2], self.lengths.unsqueeze(-1)
        if is_kept is None:
            at, n_kept = lengths + torch.arange(n, device=like.device), n
        else:
            at, n_kept = torch.where(is_kept, lengths + is_kept.cumsum(-1) - 1, -1), is_kept.sum(-1)
        if may_wait or self.is_at_hand:
            self.look()
            counts = self.counts + (n if is_kept is None else n_kept.cpu())
        else:
            self._settle()
            counts, self.is_estimate = self.counts + n, self.is_estimate or is_kept is not None
        self._n_since += n
        self._allot(counts, rows)
        self.lengths = (self.lengths + n_kept).int()
        self._put(rows, at)

    def follow_lengths(self, like: dict[str, torch.Tensor]) -> None:
        """Bring pages and counts in line with `lengths`, which have been changed in place (on a CPU)."""
        self._allot(self.lengths.long(), like)

    def make_room(self, like: dict[str, torch.Tensor]) -> None:
        """Have a page for one more row of every head, whose lengths only the device knows."""
        self._settle()
        self._n_since += 1
        self._allot(self.counts + 1, like)
        self.is_estimate = True

    def look(self) -> None:
        """Wait for the device to say how long heads are, and take back the pages that they turned out not to need."""
        if self.is_estimate:
            self._allot(self.lengths.cpu().long())
        self.is_estimate, self._landing = False, None

    def expect(self) -> None:
        """Have the lengths sent here; pages are taken back at the first change after they have arrived."""
        if self.is_estimate and self._landing is None:
            self._landing, self._n_since = Landing(self.lengths), 0

    def _settle(self) -> None:
        """Make use of lengths that have arrived: heads can have grown since, by as many rows as were added."""
        if self._landing is not None and self._landing.has_arrived:
            arrived, self._landing = self._landing.values.long() + self._n_since, None
            self._allot(torch.minimum(self.counts, arrived))

    @property
    def is_at_hand(self) -> bool:
        """Whether looking at lengths costs nothing."""
        return self.table is None or self.table.device.type == "cpu"

    def put(self, rows: dict[str, torch.Tensor], slot: torch.Tensor) -> None:
        """Write rows `[B, Hkv, 1, ...]` at `slot` `[B, Hkv]` of their heads; where it is -1 they go nowhere."""
        self._put(rows, slot.unsqueeze(-1))

    def _put(self, rows: dict[str, torch.Tensor], at: torch.Tensor) -> None:
        """Write rows `[B, Hkv, n, ...]` at `at` `[B, Hkv, n]` of their heads; what is below 0 goes to page 0."""
        at = self._address(at).flatten()
        for name in self.fields:
            self._flat(name)[at] = rows[name].flatten(0, 2)

    def keep(self, is_kept: torch.Tensor, may_wait: bool = True) -> None:
        """Keep the rows where boolean `is_kept` `[B, Hkv, n_tokens]`, and free the pages that this leaves empty.

        Args:
            is_kept: which.
            may_wait: for a device to say how many these are; otherwise pages are freed later, see `expect`.
        """
        is_kept = is_kept & self.is_row
        n = is_kept.shape[-1]
        index = torch.arange(n, device=is_kept.device).expand(is_kept.shape)
        # the row that comes to each place; of those that go, behind the end
        target = torch.where(is_kept, is_kept.cumsum(-1) - 1, n)
        source = index.new_zeros(*index.shape[:2], n + 1).scatter_(-1, target, index)[..., :n]
        source, lengths = self._address(source).flatten(), is_kept.sum(-1, dtype=torch.int32)
        at = self._address(torch.where(index < lengths.unsqueeze(-1), index, -1)).flatten()
        for name in self.fields:
            flat = self._flat(name)
            flat[at] = flat[source]
        self.lengths = lengths
        if may_wait or self.is_at_hand:
            self._allot(lengths.cpu().long())
            self.is_estimate, self._landing = False, None
        else:
            self._settle()
            self.is_estimate = True
            self.expect()

    def truncate_by(self, n: int) -> None:
        """Drop the newest `n` rows of every head (or all it has)."""
        self.look()
        self._allot((self.counts - n).clamp(min=0))
        self._send_lengths()

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
        index = torch.arange(self.n_tokens, device=self.lengths.device)
        at = self._address(torch.where(self.is_row, index, -1)).flatten()
        self._flat(name)[at] = values.flatten(0, 2).to(self.tensors[name].dtype)

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
        self._send_lengths()
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
        pages = torch.nn.functional.pad(sources[used.to(sources.device)].long(), (1, 0))
        self.tensors = {name: t[pages] for name, t in held.items()}
        self._own_all(used, counts)
        self._send_lengths()

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
        self.tensors, self.is_estimate, self._landing = {}, False, None

    def _pages(self, counts: torch.Tensor) -> torch.Tensor:
        return (counts + (self.page - 1)) // self.page

    def _allot(self, counts: torch.Tensor, like: dict[str, torch.Tensor] | None = None) -> None:
        """Give every head the pages for `counts` `[B, Hkv]` rows, take back those beyond, and note the counts.

        Where memory does not suffice, heads have the pages that they had.
        """
        before, after = self._pages(self.counts), self._pages(counts)
        if like is not None and not self.tensors:
            # rows that are all padding need no page, but those who look for rows a place to find none in
            self._grow(0, like)
        if before.equal(after):
            self.counts = counts
            return
        most = max(int(after.max()), self.table.shape[2])
        has, wants = (torch.arange(most) < n_pages.unsqueeze(-1) for n_pages in (before, after))
        gives, takes = self._places(has & ~wants), self._places(wants & ~has)
        n_missing = len(takes) - len(gives) - self.free.shape[0]
        if n_missing > 0:
            self._grow(n_missing + max(MIN_SLACK_PAGES, int(after.sum()) // SLACK), like)
        # one that was handed out stays as it is
        table = torch.nn.functional.pad(self.table, (0, most - self.table.shape[2])).flatten()
        # the pages that were freed last go first
        free = torch.cat([self.free, table[gives]])
        n_left = free.shape[0] - len(takes)
        table[takes], free = free[n_left:], free[:n_left].clone()
        self.table, self.free, self.counts = table.view(*counts.shape, most), free, counts
        spare = int(after.sum()) // SLACK + MIN_SLACK_PAGES
        if free.shape[0] > 2 * spare:
            self._shrink(spare)

    def _places(self, where: torch.Tensor) -> torch.Tensor:
        """Places in the flat table: of a boolean mask on the CPU, where it costs no wait to find them."""
        return sent_to(self.table.device, where.flatten().nonzero().squeeze(1))

    def _send_lengths(self) -> None:
        """Have the device know the counts."""
        self.lengths = sent_to(self.table.device, self.counts.int())

    def _grow(self, n_pages: int, like: dict[str, torch.Tensor] | None) -> None:
        first, grown = max(self.n_pages, 1), {}  # behind the page that is nobody's
        for name in self.fields:
            held = self.tensors.get(name)
            shape = like[name].shape[3:] if held is None else held.shape[3:]
            dtype = like[name].dtype if held is None else held.dtype
            fresh = torch.empty(first + n_pages, 1, self.page, *shape, dtype=dtype, device=self.table.device)
            if held is not None:
                fresh[:first] = held
            grown[name] = fresh
        new = torch.arange(first, first + n_pages, dtype=torch.int32, device=self.table.device)
        self.tensors, self.free = grown, torch.cat([new.flip(0), self.free])

    def _shrink(self, spare: int) -> None:
        """Copy the pages in use, head after head, to a pool of that size and `spare` pages."""
        used = torch.arange(self.table.shape[2]) < self._pages(self.counts).unsqueeze(-1)
        pages = self.table.flatten()[self._places(used)].long()
        n_used, shrunk = 1 + pages.shape[0], {}
        for name, held in self.tensors.items():
            fresh = torch.empty(n_used + spare, *held.shape[1:], dtype=held.dtype, device=held.device)
            fresh[1:n_used] = held[pages]
            shrunk[name] = fresh
        self.tensors = shrunk
        self._own_all(used, self.counts)

    def _own_all(self, used: torch.Tensor, counts: torch.Tensor) -> None:
        """Let heads own the pages behind the first one after another, at the places of the table where `used`."""
        most = int(self._pages(counts).max()) if counts.numel() else 0
        table, n_used = torch.zeros(used.shape, dtype=torch.int32), 1 + int(used.sum())
        table[used] = torch.arange(1, n_used, dtype=torch.int32)
        device = self.lengths.device
        self.table, self.counts = sent_to(device, table[..., :most].contiguous()), counts
        self.free = torch.arange(n_used, self.n_pages, dtype=torch.int32, device=device).flip(0)

    def _flat(self, name: str) -> torch.Tensor:
        """A tensor as rows: `[P * page, ...]`."""
        return self.tensors[name].flatten(0, 2)

    def _address(self, index: torch.Tensor | None) -> torch.Tensor:
        """Where rows `index` `[B, Hkv, n]` of their heads lie among all; None means every place of the padded form.

        Those below 0 and behind the table lie in the page of nobody.
        """
        if index is None:
            index = torch.arange(self.n_tokens, device=self.table.device).expand(*self.table.shape[:2], -1)
        n = self.table.shape[2] * self.page
        if not n:
            return torch.zeros_like(index)
        is_place, index = (index >= 0) & (index < n), index.clamp(min=0, max=n - 1)
        pages = self.table.long().gather(2, index // self.page)
        return torch.where(is_place, pages, 0) * self.page + index % self.page
