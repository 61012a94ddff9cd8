"""Attention over a store of independent rows: what holds their values, and what says their places."""

from __future__ import annotations

import torch

from hf_kvcache.codecs.base import Chain, Codec
from hf_kvcache.kernels.sparse_attention import SparseRows, sparse_attention


def attend_sparse_rows(q, store, dense, *, scaling, mask, softcap):
    """`sparse_attention` over a store of independent rows: sparse, quantised per token, both, or dense on one side."""
    return sparse_attention(
        q,
        *sides_as_sparse_rows(store),
        None if dense is None else dense["k"],
        None if dense is None else dense["v"],
        scaling=scaling,
        mask=mask,
        softcap=softcap,
    )


def sides_as_sparse_rows(store) -> tuple[SparseRows, SparseRows]:
    """Keys and values of a store as the op reads them; values may be of another head size."""
    keys = as_sparse_rows(store.keys, store.encoded("k"), store.width("k"))
    return keys, as_sparse_rows(store.values, store.encoded("v"), store.width("v"))


def as_sparse_rows(codec: Codec, encoded: dict[str, torch.Tensor], head_dim: int) -> SparseRows:
    """One side of a store as the op reads it: what says the places, and what holds the values."""
    places, layout, group_size = None, "bitmap", None
    if codec.format.startswith("sparse"):
        first = codec.first if isinstance(codec, Chain) else codec
        places, layout, group_size = encoded["places"], first.layout, first.group_size
    if not codec.format.endswith("int"):
        values = encoded["rows" if places is None else "values"]
        return SparseRows(values, places, layout, group_size=group_size, head_dim=head_dim)
    prefix, integers = ("second.", codec.second) if isinstance(codec, Chain) else ("", codec)
    codes, scale, zero = (encoded[prefix + name] for name in ("codes", "scale", "zero"))
    return SparseRows(codes, places, layout, scale, zero, integers.bits, group_size, head_dim)
