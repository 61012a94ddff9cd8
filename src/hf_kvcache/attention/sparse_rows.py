"""Attention over a store of independent rows: sparse, quantised per token, both, or dense on one side."""

from __future__ import annotations

from hf_kvcache.attention.row_sides import sides_as_sparse_rows
from hf_kvcache.kernels.sparse_attention import sparse_attention


def attend_sparse_rows(q, store, dense, *, scaling, mask, softcap):
    """`sparse_attention` over the packed rows of a store, and over `dense` ones."""
    tail = (None, None) if dense is None else (dense["k"], dense["v"])
    return sparse_attention(q, *sides_as_sparse_rows(store), *tail, scaling=scaling, mask=mask, softcap=softcap)
