"""One side of a cache whose rows keep some of their channels, as ops take it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class SparseRows(NamedTuple):
    """One side, K or V, of a cache whose rows keep `k` of their `D` channels (layouts: README.md of `sparse_pack`).

    Attributes:
        values: kept channels `[B, Hkv, N, k]` in the dtype of the query; or, where `bits` is given, codes of
            `quant_pack` with `axis="token"`, int16 `[B, Hkv, N, k * bits / 16]`.
        places: uint8, bitmaps `[B, Hkv, N, ceil(D / 8)]` or channel numbers `[B, Hkv, N, k]`; None where all `D`
            channels are kept in order (`k = D`).
        layout: "bitmap" or "index".
        scale, zero: float16 `[B, Hkv, N, groups]`, for codes.
        bits: width of a code, 8, 4, 3 or 2; None for values that are not quantised.
        group_size: every group of this many channels keeps an equal share (4 with `k = D / 2`: the 2:4 pattern).
        head_dim: `D` of rows with places, where it is not that of the query; None where it is.
    """

    values: torch.Tensor
    places: torch.Tensor | None
    layout: str = "bitmap"
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    bits: int | None = None
    group_size: int | None = None
    head_dim: int | None = None

    @property
    def keep(self) -> int:
        """Channels kept per row: `k`."""
        return self.values.shape[-1] if self.bits is None else self.values.shape[-1] * 16 // self.bits

    def row_width(self, query_width: int) -> int:
        """Channels of a whole row, `D`, beside queries of `query_width` channels."""
        if self.places is None:
            return self.keep
        return query_width if self.head_dim is None else self.head_dim
