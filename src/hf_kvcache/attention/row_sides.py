"""A store of independent rows as ops read it: what holds the values of each side, and what says their places."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hf_kvcache.kernels.sparse_attention.rows import SparseRows

if TYPE_CHECKING:
    from hf_kvcache.codecs.base import Codec


def sides_as_sparse_rows(store) -> tuple[SparseRows, SparseRows]:
    """Keys and values of a store as the op reads them; values may be of another head size."""
    keys = as_sparse_rows(store.keys, store.encoded("k"), store.width("k"))
    return keys, as_sparse_rows(store.values, store.encoded("v"), store.width("v"))


def as_sparse_rows(codec: Codec, encoded: dict[str, torch.Tensor], head_dim: int) -> SparseRows:
    """One side of a store as the op reads it: what says the places, and what holds the values."""
    places, layout, group_size = None, "bitmap", None
    if codec.format.startswith("sparse"):
        first = codec.parts[0]
        places, layout, group_size = encoded["places"], first.layout, first.group_size
    if not codec.format.endswith("int"):
        values = encoded["rows" if places is None else "values"]
        return SparseRows(values, places, layout, group_size=group_size, head_dim=head_dim)
    prefix = "second." * (len(codec.parts) > 1)
    codes, scale, zero = (encoded[prefix + name] for name in ("codes", "scale", "zero"))
    return SparseRows(codes, places, layout, scale, zero, codec.parts[-1].bits, group_size, head_dim)
