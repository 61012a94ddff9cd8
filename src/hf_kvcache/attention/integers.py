"""Attention over a store whose keys and values are integers."""

from __future__ import annotations

from hf_kvcache.kernels.quant_attention import quant_attention


def attend_integers(q, store, dense, *, scaling, mask, softcap):
    """`quant_attention` over a store whose keys and values are integers."""
    # with their spare rows: cutting six tensors to size costs as much as reading a few hundred rows
    packed = store.packed.tensors
    return quant_attention(
        q,
        (packed["k.codes"], packed["k.scale"], packed["k.zero"]),
        (packed["v.codes"], packed["v.scale"], packed["v.zero"]),
        None if dense is None else dense["k"],
        None if dense is None else dense["v"],
        bits=(store.keys.bits, store.values.bits),
        key_axis=store.keys.axis,
        n_packed=store.packed.n_tokens,
        scaling=scaling,
        mask=mask,
        softcap=softcap,
    )
