"""Attention over a store with low-rank latents on one side at least."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hf_kvcache.kernels.lowrank_attention import KeyExpansion, Latents, lowrank_attention

if TYPE_CHECKING:
    from hf_kvcache.codecs.base import Codec


def attend_lowrank(q, store, dense, *, scaling, mask, softcap):
    """`lowrank_attention` over a store with latents on one side at least; `dense` is merged by the caller."""
    keys, values = (as_latents(codec, store.encoded(side)) for side, codec in (("k", store.keys), ("v", store.values)))
    part, expansion = store.keys.fitted_part, None
    if part is not None and part.format == "lowrank/rope":
        basis, rope = part.basis, part.rotary
        tables = rope.tables(q.device)
        expansion = KeyExpansion(basis.up_by_head, basis.mean_by_head, store.packed["position_ids"], tables)
        q = rope.scale_query(q)
    return lowrank_attention(q, keys, values, expansion, scaling=scaling, mask=mask, softcap=softcap)


def as_latents(codec: Codec, encoded: dict[str, torch.Tensor]) -> Latents:
    """One side of a store as the op reads it; dense and quantised rows are latents of one head and full rank."""
    if not codec.format.endswith("int"):
        return Latents(encoded["latents" if codec.format.startswith("lowrank") else "rows"])
    prefix = "second." * (len(codec.parts) > 1)
    codes, scale, zero = (encoded[prefix + name] for name in ("codes", "scale", "zero"))
    return Latents(codes, scale, zero, codec.parts[-1].bits)
