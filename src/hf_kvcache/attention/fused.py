"""Attention on the stored bytes: pick the op that reads a store's format."""

from __future__ import annotations

from functools import cache

import torch

from hf_kvcache.attention.blockwise import attend_blocks
from hf_kvcache.attention.mask import visible
from hf_kvcache.codecs.base import ROWS, Chain, Codec
from hf_kvcache.codecs.quantize import Quantize
from hf_kvcache.kernels.dense_attention import dense_attention
from hf_kvcache.kernels.lowrank_attention import KeyExpansion, Latents, lowrank_attention
from hf_kvcache.kernels.merge_states import merge_two, with_sink
from hf_kvcache.kernels.quant_attention import quant_attention
from hf_kvcache.kernels.ragged_attention import ragged_attention
from hf_kvcache.kernels.sparse_attention import SparseRows, sparse_attention

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
    if is_few and store.is_ragged and (mask is None or not _hides_pages(view, mask)):
        return _attend_pages(q, view, scaling, mask, softcap)
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


def _hides_pages(view, mask) -> bool:
    """Whether a mask hides a row in a page, which the op over pages has no mask for."""
    n = view.layer.store.n_packed
    is_row = (view.positions[..., :n] >= 0).unsqueeze(2)
    return bool((is_row & ~mask[..., :n]).any())


def _attend_pages(q, view, scaling, mask, softcap):
    """Pages hold real tokens that all queries see; the dense window, where padding and order matter, has a mask."""
    store, n_new = view.layer.store, q.shape[2]
    keys, values = sides_as_sparse_rows(store)
    in_basis = store.keys.project_query(q)
    pages = store.packed.table, store.packed.lengths
    out, lse = ragged_attention(in_basis, keys, values, *pages, scaling=scaling, softcap=softcap)
    if mask is not None:
        mask = mask[..., store.n_packed :]
    elif n_new > 1 or view.layer.has_padding:
        mask = visible(store.dense["position"], view.tokens_seen, n_new)
    tail = dense_attention(q, store.dense["k"], store.dense["v"], scaling=scaling, mask=mask, softcap=softcap)
    return merge_two((store.values.project_output(out).to(q.dtype), lse), tail)


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
    """The function below that reads these formats, or None."""
    if keys in ("int/channel", "int") and values == "int":
        return attend_integers
    if "lowrank" in keys + values and keys.removesuffix(">int") in (*_LATENTS, "lowrank/rope"):
        return attend_lowrank if values.removesuffix(">int") in _LATENTS else None
    if keys in ROWS and values in ROWS and (keys, values) != ("dense", "dense"):
        return attend_sparse_rows
    return None


def attend_integers(q, store, dense, *, scaling, mask, softcap):
    """`quant_attention` over a store whose keys and values are integers."""
    k, v = store.encoded("k"), store.encoded("v")
    return quant_attention(
        q,
        (k["codes"], k["scale"], k["zero"]),
        (v["codes"], v["scale"], v["zero"]),
        None if dense is None else dense["k"],
        None if dense is None else dense["v"],
        bits=(store.keys.bits, store.values.bits),
        key_axis=store.keys.axis,
        scaling=scaling,
        mask=mask,
        softcap=softcap,
    )


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


def attend_lowrank(q, store, dense, *, scaling, mask, softcap):
    """`lowrank_attention` over a store with latents on one side at least; `dense` is merged by the caller."""
    keys, values = (as_latents(codec, store.encoded(side)) for side, codec in (("k", store.keys), ("v", store.values)))
    first = store.keys.first if isinstance(store.keys, Chain) else store.keys
    expansion = None
    if first.format == "lowrank/rope":
        basis, rope = first.basis, first.rotary
        tables = rope.tables(q.device)
        expansion = KeyExpansion(basis.up_by_head, basis.mean_by_head, store.packed["rope"], tables)
        q = rope.scale_query(q)
    return lowrank_attention(q, keys, values, expansion, scaling=scaling, mask=mask, softcap=softcap)


def as_latents(codec: Codec, encoded: dict[str, torch.Tensor]) -> Latents:
    """One side of a store as the op reads it; dense and quantised rows are latents of one head and full rank."""
    prefix, integers = ("second.", codec.second) if isinstance(codec, Chain) else ("", codec)
    if not isinstance(integers, Quantize):
        return Latents(encoded["latents" if codec.format.startswith("lowrank") else "rows"])
    codes, scale, zero = (encoded[prefix + name] for name in ("codes", "scale", "zero"))
    return Latents(codes, scale, zero, integers.bits)


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
