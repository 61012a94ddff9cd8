"""Attention of a few queries over low-rank latents of keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_kvcache.kernels import select
from hf_kvcache.rope import RotaryTables

__all__ = ["KeyExpansion", "Latents", "lowrank_attention"]


class Latents(NamedTuple):
    """One side, K or V, of a cache whose rows are latents that `Hkv / G` neighbouring KV heads share.

    Attributes:
        rows: latents `[B, G, N, r]` in the dtype of the query; or, where `bits` is given, codes of `quant_pack` with
            `axis="token"`, int16 `[B, G, N, r * bits / 16]`.
        scale, zero: float16 `[B, G, N, groups]`, for codes.
        bits: width of a code, 8, 4, 3 or 2; None for latents that are not quantised.
    """

    rows: torch.Tensor
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    bits: int | None = None

    @property
    def rank(self) -> int:
        """Channels of a latent: `r`."""
        return self.rows.shape[-1] if self.bits is None else self.rows.shape[-1] * 16 // self.bits


class KeyExpansion(NamedTuple):
    """How a key is rebuilt from its latent: `rotate(latent @ up + mean, position)`.

    Attributes:
        up: `[Hkv, r, D]` in the dtype of the query; every head has its own, also where heads share latents.
        mean: float32 `[Hkv, D]`, or None.
        positions: int32 `[B, 1 | Hkv, N]`, never negative (0 for padding); None where keys are not rotated.
        tables: what `positions` mean, `hf_kvcache.rope.RotaryTables` on the device of the query.
    """

    up: torch.Tensor
    mean: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    tables: RotaryTables | None = None


def lowrank_attention(
    q: torch.Tensor,
    keys: Latents,
    values: Latents,
    expansion: KeyExpansion | None = None,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over latents: keys are rebuilt tile by tile, values are summed as latents (Palu, arXiv 2407.21118).

    The caller expands the result once per query: `out @ up_v`, since the sum over tokens and the expansion commute.
    Dense rows and sides are latents of full rank with one head per group. Algebra and layout: README.md.

    Args:
        q: queries, float16, bfloat16, float32 or float64: `[B, Hq, S, D]` with `expansion`; without it already
            projected, `[B, Hq, S, r_k]` ("absorbed", for bases that act after the rotation).
        keys: `G_k` groups of latents of rank `r_k`; `G_k` divides `Hkv`.
        values: `G_v` groups of latents of rank `r_v`; `G_v` divides `Hkv`.
        expansion: how keys are rebuilt, or None. It says `Hkv`; without it `Hkv` is the larger of `G_k` and `G_v`.
        scaling: factor on the scores.
        mask: boolean `[B | 1, Hkv | 1, S, N]`, True where a query may look; None for everything.
        softcap: scores become `softcap * tanh(scores / softcap)`.

    Returns:
        The softmax-weighted sum of value latents, `[B, Hq, S, r_v]`, and the natural log-sum-exp of the scores,
        scaled and capped, `[B, Hq, S]`: both in float32 (float64 for float64 queries). A query that sees nothing
        gets zeros and `-inf`.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    check_latents(q, keys, values, expansion, mask)
    run = select("lowrank_attention", q.device, (q, keys, values, expansion))
    return run(q, keys, values, expansion, scaling=scaling, mask=mask, softcap=softcap)


def kv_heads(keys: Latents, values: Latents, expansion: KeyExpansion | None) -> int:
    """`Hkv` of a call."""
    return max(keys.rows.shape[1], values.rows.shape[1]) if expansion is None else expansion.up.shape[0]


def check_latents(q, keys, values, expansion, mask):
    n_kv_heads = kv_heads(keys, values, expansion)
    B, n_heads, S, width = q.shape
    N = keys.rows.shape[2]
    if n_heads % n_kv_heads:
        raise ValueError(f"{n_heads} query heads are not a multiple of {n_kv_heads} KV heads")
    for name, side in (("keys", keys), ("values", values)):
        shape = side.rows.shape
        if len(shape) != 4 or shape[0] != B or shape[2] != N or n_kv_heads % shape[1]:
            raise ValueError(f"{name}: latents {list(shape)} are not [{B}, G, {N}, r], G dividing {n_kv_heads}")
        if side.bits is None and side.rows.dtype != q.dtype:
            raise ValueError(f"{name}: latents are {side.rows.dtype}, queries {q.dtype}")
        if side.bits is not None and (side.rows.dtype != torch.int16 or side.scale is None or side.zero is None):
            raise ValueError(f"{name}: {side.bits}-bit latents are int16 codes with scale and zero")
    if expansion is None:
        if width != keys.rank:
            raise ValueError(f"queries have {width} channels, key latents {keys.rank}: project the queries first")
    else:
        up, wanted = expansion.up, (n_kv_heads, keys.rank, width)
        if up.shape != wanted or up.dtype != q.dtype:
            raise ValueError(f"up must be {q.dtype} {list(wanted)}, got {up.dtype} {list(up.shape)}")
        if (expansion.positions is None) != (expansion.tables is None):
            raise ValueError("positions and tables go together")
        if expansion.positions is not None and expansion.positions.shape not in ((B, 1, N), (B, n_kv_heads, N)):
            raise ValueError(f"positions must be [{B}, 1 | {n_kv_heads}, {N}], got {list(expansion.positions.shape)}")
    if mask is not None:
        sizes_fit = mask.dim() == 4 and mask.shape[0] in (1, B) and mask.shape[1] in (1, n_kv_heads)
        if mask.dtype != torch.bool or not sizes_fit or mask.shape[2:] != (S, N):
            wanted = f"[{B}|1, {n_kv_heads}|1, {S}, {N}]"
            raise ValueError(f"mask must be bool {wanted}, got {mask.dtype} {list(mask.shape)}")
