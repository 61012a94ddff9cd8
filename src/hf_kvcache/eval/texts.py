"""Texts that a model reads together: token ids, padded on the left."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Texts:
    """Token ids of one text or several.

    Attributes:
        ids: `[B, T]`, int64.
        n_padding: tokens of padding that each row begins with, int64 `[B]`; None where no row has any.
    """

    ids: torch.Tensor
    n_padding: torch.Tensor | None = None

    @classmethod
    def of(cls, rows: list[list[int]], device=None) -> Texts:
        """Texts of any lengths, the shorter ones padded."""
        n = max(map(len, rows))
        ids = torch.tensor([[0] * (n - len(row)) + row for row in rows], device=device)
        n_padding = torch.tensor([n - len(row) for row in rows], device=device)
        return cls(ids, n_padding if n_padding.any() else None)

    def followed_by(self, ids: torch.Tensor) -> Texts:
        """These texts and what comes next, `[B, S]`."""
        return Texts(torch.cat([self.ids, ids], 1), self.n_padding)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every text, padding not counted."""
        batch_size, n = self.ids.shape
        return [n] * batch_size if self.n_padding is None else (n - self.n_padding).tolist()

    @property
    def mask(self) -> torch.Tensor | None:
        """`[B, T]`, zeros for padding; None where there is none."""
        return mask_of(self.n_padding, self.ids.shape[1])


def mask_of(n_padding: torch.Tensor | None, n_tokens: int) -> torch.Tensor | None:
    """The attention mask `[B, n_tokens]` of texts that begin with padding, int64; None where none does."""
    if n_padding is None:
        return None
    return (torch.arange(n_tokens, device=n_padding.device) >= n_padding[:, None]).long()
