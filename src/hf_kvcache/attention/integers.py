"""Attention over a store whose keys and values are integers."""

from __future__ import annotations

from hf_kvcache.kernels.quant_attention import quant_attention


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
