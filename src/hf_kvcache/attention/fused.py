"""Attention on the stored bytes: pick the op that reads a store's format."""

from __future__ import annotations

from functools import cache

import torch

from hf_kvcache.attention.blockwise import attend_blocks
from hf_kvcache.kernels.dense_attention import dense_attention
from hf_kvcache.kernels.merge_states import merge_two, with_sink

# above this many queries a call is compute-bound: unpacking a block once for all of them and using a large matrix
# product beats reading the packed bytes for every group of queries
MAX_QUERIES = 32

# what an op over latents takes: dense and quantised rows are latents of full rank
_LATENTS = ("lowrank", "dense", "int")


def attend(q, view, *, scaling, mask=None, softcap=None, sinks=None) -> torch.Tensor:
    """Attend over what the layer of `view` keeps, on the stored bytes where an op reads their format.

    Args:
        q: queries `[B, Hq, S, D]`.
        view: a `KVView`.
        scaling, softcap: as in `kernels.dense_attention`.
        mask: boolean `[B | 1, Hkv | 1, S, N]` in view order, or None when nothing but the future is hidden.
        sinks: score of one more key per query head whose value is zero, `[Hq]`, or None.

    Returns:
        The output `[B, Hq, S, Dv]` in the dtype of `q`.
    """
    out, lse = _attend(q, view, view.layer.store, scaling, mask, softcap)
    return out if sinks is None else with_sink(out, lse, sinks)[0]


def reads_pages(view, n_new: int) -> bool:
    """Whether a call goes to pages, which need no mask as long as none hides a row that is older than the call."""
    store = view.layer.store
    return bool(store.is_ragged and store.n_packed and n_new <= MAX_QUERIES)


def _attend(q, view, store, scaling, mask, softcap):
    """Output and log-sum-exp."""
    is_few, dense = q.shape[2] <= MAX_QUERIES, store.dense
    if is_few and not store.packed.n_tokens:
        return dense_attention(q, dense["k"], dense["v"], scaling=scaling, mask=mask, softcap=softcap)
    if is_few and store.is_ragged:
        from hf_kvcache.attention.pages import attend_pages, hides_pages

        if mask is None or not hides_pages(view, mask):
            return attend_pages(q, view, scaling, mask, softcap)
    if not is_few or store.is_ragged:
        return attend_blocks(q, view, scaling=scaling, mask=mask, softcap=softcap)
    attend_op = op_of(store.keys.format, store.values.format)
    if attend_op is None:
        return attend_blocks(q, view, scaling=scaling, mask=mask, softcap=softcap)
    if softcap is not None and store.keys.query_offset(q) is not None:
        # what a projected query lacks belongs inside the cap
        return attend_blocks(q, view, scaling=scaling, mask=mask, softcap=softcap)
    if store.keys.projects or store.values.projects:
        return _attend_projected(attend_op, q, store, scaling, mask, softcap)
    return attend_op(q, store, dense, scaling=scaling, mask=mask, softcap=softcap)


def _attend_projected(op, q, store, scaling, mask, softcap):
    """Packed rows live in a basis of their own: attend there, come back, and merge with the dense tail."""
    n = store.n_packed
    in_basis = store.keys.project_query(q)
    packed_mask = None if mask is None else mask[..., :n]
    out, lse = op(in_basis, store, None, scaling=scaling, mask=packed_mask, softcap=softcap)
    offset = store.keys.query_offset(q)
    lse = lse if offset is None else lse + scaling * offset
    out = store.values.project_output(out).to(q.dtype)
    if not store.dense.n_tokens:
        return out, lse
    tail_mask = None if mask is None else mask[..., n:]
    tail = dense_attention(q, store.dense["k"], store.dense["v"], scaling=scaling, mask=tail_mask, softcap=softcap)
    return merge_two((out, lse), tail)


@cache
def op_of(keys: str, values: str):
    """The function that attends to rows of these formats, or None; its module is imported when it is asked for."""
    from hf_kvcache.codecs.base import ROWS

    if keys in ("int/channel", "int") and values == "int":
        from hf_kvcache.attention.integers import attend_integers

        return attend_integers
    is_latent = keys.removesuffix(">int") in (*_LATENTS, "lowrank/rope") and values.removesuffix(">int") in _LATENTS
    if "lowrank" in keys + values and is_latent:
        from hf_kvcache.attention.latents import attend_lowrank

        return attend_lowrank
    if keys in ROWS and values in ROWS and (keys, values) != ("dense", "dense"):
        from hf_kvcache.attention.sparse_rows import attend_sparse_rows

        return attend_sparse_rows
    return None
