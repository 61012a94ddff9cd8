"""What a store must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch

from hf_kvcache.stores.buffer import RowBuffer


class Store(ABC):
    """Tensors that exist, and the positions of what is in them.

    A store knows rows, not models: `N` kept rows per KV head, in *view order*: packed rows first, then dense rows.
    """

    @property
    @abstractmethod
    def n_kept(self) -> int:
        """Rows kept per head (the largest over the heads where they differ)."""

    @abstractmethod
    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add rows `[B, Hkv, n, D]` to the dense tail."""

    @abstractmethod
    def keep(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` `[B, Hkv, n]` (view order, ascending) and free the others."""

    @abstractmethod
    def pack(self) -> None:
        """Move what has left the dense window into the codec; afterwards the store owns all its bytes."""

    @abstractmethod
    def crop(self, n_tokens: int) -> None:
        """Forget the newest `n_tokens` rows."""

    @abstractmethod
    def buffers(self) -> dict[str, RowBuffer]:
        """Every payload, declared once: batch operations, moving, saving and counting go through here."""

    @abstractmethod
    def blocks(self, size: int, sides: str = "kv") -> Iterator[tuple[torch.Tensor, ...]]:
        """Dense K and V (or one of them), `size` rows at a time, in view order, without expanding the rest."""

    @property
    @abstractmethod
    def positions(self) -> torch.Tensor | None:
        """Logical position of every kept row, int32 `[B, Hkv, N]`, -1 for padding; None when nothing is tracked."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare rows and metadata included."""
        return sum(buffer.nbytes for buffer in self.buffers().values())
