"""Attention over pages, in which heads keep different numbers of rows."""

from __future__ import annotations

from hf_kvcache.attention.kept_columns import visible
from hf_kvcache.attention.row_sides import sides_as_sparse_rows
from hf_kvcache.kernels.dense_attention import dense_attention
from hf_kvcache.kernels.merge_states import merge_two
from hf_kvcache.kernels.ragged_attention import ragged_attention


def hides_pages(view, mask) -> bool:
    """Whether a mask hides a row in a page, which the op over pages has no mask for."""
    n = view.layer.store.n_packed
    is_row = (view.positions[..., :n] >= 0).unsqueeze(2)
    return bool((is_row & ~mask[..., :n]).any())


def attend_pages(q, view, scaling, mask, softcap):
    """Pages hold real tokens that all queries see; the dense window, where padding and order matter, has a mask."""
    store, n_new = view.layer.store, q.shape[2]
    if mask is not None:
        mask = mask[..., store.n_packed :]
    elif n_new > 1 or view.layer.has_padding:
        mask = visible(store.dense["position"], view.tokens_seen, n_new)
    pages = *sides_as_sparse_rows(store), store.packed.table, store.packed.lengths
    window = store.dense["k"], store.dense["v"]
    if not (store.keys.projects or store.values.projects):
        return ragged_attention(q, *pages, *window, scaling=scaling, mask=mask, softcap=softcap)
    # rows in pages live in a basis of their own: attend there, come back, and merge with the window
    out, lse = ragged_attention(store.keys.project_query(q), *pages, scaling=scaling, softcap=softcap)
    tail = dense_attention(q, *window, scaling=scaling, mask=mask, softcap=softcap)
    return merge_two((store.values.project_output(out).to(q.dtype), lse), tail)
