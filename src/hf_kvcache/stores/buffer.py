"""Named tensors that hold the same tokens and grow together."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_kvcache.kernels.pages import on_huge_pages

# Spare room when a buffer has to grow, as a fraction of what it holds: small enough that the allocated bytes stay
# close to the used ones, large enough that growing costs about 16 row copies per token however long the cache is.
SLACK = 16
MIN_SLACK_TOKENS = 8


class RowBuffer:
    """Tensors `[B, Hkv, rows, ...]` with spare rows, of which the first tokens are in use.

    Every payload of a layer lives in such a buffer, so batch selection, cropping, moving and saving are
    written here once.

    Args:
        tokens_per_row: for every tensor name, how many tokens one row stands for (1 for codes, 32 for a
            per-channel scale of a block of 32 tokens).
    """

    def __init__(self, tokens_per_row: dict[str, int]):
        self.tokens_per_row = dict(tokens_per_row)
        self.unit = max(tokens_per_row.values(), default=1)
        self.tensors: dict[str, torch.Tensor] = {}
        self.n_tokens = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        """The rows in use of one tensor: a view `[B, Hkv, n_tokens / tokens_per_row, ...]`."""
        return self.tensors[name].narrow(2, 0, self.n_tokens // self.tokens_per_row[name])

    def views(self) -> dict[str, torch.Tensor]:
        """The rows in use of every tensor, by name."""
        return {name: self[name] for name in self.tensors}

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return min((t.shape[2] * self.tokens_per_row[name] for name, t in self.tensors.items()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind the tensors, spare rows included."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors.values()}
        return sum(storages.values())

    def append(self, rows: dict[str, torch.Tensor | float], n_tokens: int) -> None:
        """Add `n_tokens` tokens: tensors `[B, Hkv, rows, ...]`, or one number for all rows where the buffer has some.

        An empty buffer adopts the tensors as they are, without copying them.
        """
        if not self.tensors:
            self.tensors, self.n_tokens = dict(rows), n_tokens
            return
        needed, tensors = self.n_tokens + n_tokens, self.tensors
        for name, t in tensors.items():
            if needed > t.shape[2] * self.tokens_per_row[name]:
                self.reserve(needed + max(MIN_SLACK_TOKENS, needed // SLACK))
                break
        for name, new in rows.items():
            per_row = self.tokens_per_row[name]
            tensors[name][:, :, self.n_tokens // per_row : needed // per_row] = new
        self.n_tokens = needed

    def reserve(self, capacity: int) -> None:
        """Give the buffer room for `capacity` tokens (at least those it holds), in storages of its own."""
        capacity = -(-max(capacity, self.n_tokens) // self.unit) * self.unit
        self._rebuild([(0, self.n_tokens)], capacity)

    def copy_storage(self) -> None:
        """Copy what was adopted from elsewhere into contiguous storages of exactly the size in use."""
        for name, t in self.tensors.items():
            used = self[name]
            exact = used.is_contiguous() and t.untyped_storage().nbytes() == used.numel() * used.element_size()
            if not exact:
                self.tensors[name] = on_huge_pages(used.new_empty(used.shape)).copy_(used)

    def remove(self, start: int, stop: int, capacity: int | None = None) -> None:
        """Drop the tokens `[start, stop)`; the rest moves up. `capacity` re-allocates, otherwise in place."""
        if capacity is not None:
            self._rebuild([(0, start), (stop, self.n_tokens)], capacity)
            return
        kept_after = self.n_tokens - stop
        for name, t in self.tensors.items():
            per_row = self.tokens_per_row[name]
            moved = t[:, :, stop // per_row : self.n_tokens // per_row]
            overlaps = kept_after > stop - start
            t[:, :, start // per_row : (start + kept_after) // per_row] = moved.clone() if overlaps else moved
        self.n_tokens = start + kept_after

    def truncate(self, n_tokens: int) -> None:
        """Keep the first `n_tokens` tokens (a multiple of the largest `tokens_per_row`)."""
        self.n_tokens = n_tokens

    def gather(self, indices: torch.Tensor) -> None:
        """Keep the tokens `indices` `[B, Hkv, n]` of every head; needs one token per row.

        What heads shared is theirs alone afterwards.
        """
        for name in self.tensors:
            used = self[name].expand(-1, indices.shape[1], *[-1] * (self.tensors[name].dim() - 2))
            index = indices.reshape(*indices.shape, *[1] * (used.dim() - 3))
            self.tensors[name] = used.gather(2, index.expand(*indices.shape, *used.shape[3:]))
        self.n_tokens = indices.shape[2]

    def map_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor by `change(tensor)`, which works along the batch axis or moves it to a device."""
        self.tensors = {name: change(t) for name, t in self.tensors.items()}

    # moving to a device needs nothing beyond it
    move = map_batch

    def restore(self, views: dict[str, torch.Tensor], n_tokens: int) -> None:
        """Take over what `views` returned."""
        if views:
            self.tokens_per_row = dict.fromkeys(views, 1) | self.tokens_per_row
            self.append(views, n_tokens)

    def clear(self) -> None:
        """Forget everything and free the storages."""
        self.tensors, self.n_tokens = {}, 0

    def _rebuild(self, spans: list[tuple[int, int]], capacity: int) -> None:
        n_tokens = sum(stop - start for start, stop in spans)
        for name, t in self.tensors.items():
            per_row = self.tokens_per_row[name]
            fresh = on_huge_pages(t.new_empty(*t.shape[:2], capacity // per_row, *t.shape[3:]))
            at = 0
            for start, stop in spans:
                rows = (stop - start) // per_row
                fresh.narrow(2, at, rows).copy_(t.narrow(2, start // per_row, rows))
                at += rows
            self.tensors[name] = fresh
        self.n_tokens = n_tokens
