"""Attention of a few queries over packed integer rows and a dense tail."""

from __future__ import annotations

import torch

from hf_kvcache.kernels import check_operands, select

__all__ = ["quant_attention"]

Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def quant_attention(
    q: torch.Tensor,
    keys: Packed,
    values: Packed,
    tail_k: torch.Tensor | None = None,
    tail_v: torch.Tensor | None = None,
    *,
    bits: tuple[int, int],
    key_axis: str,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    n_packed: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over packed keys and values without unpacking them to memory, then over a dense tail.

    Scales are folded into the query and into the softmax weights (KIVI, arXiv 2402.02750, section 3.2;
    algebra and byte layout in README.md).

    Args:
        q: queries `[B, Hq, S, D]`, float16, bfloat16, float32 or float64.
        keys: codes int16 `[B, Hkv, N, D * bits[0] / 16]`, scale and zero float16, as `quant_pack` returns them:
            `[B, Hkv, N / 32, D]` for `key_axis="channel"`, `[B, Hkv, N, groups]` for "token".
        values: codes, scale and zero `[B, Hkv, N, groups]`, packed per token, of `Dv` channels (`D` or not).
        tail_k: dense keys `[B, Hkv, M, D]` that follow the packed rows, in the dtype of `q`, or None.
        tail_v: dense values `[B, Hkv, M, Dv]`, likewise.
        bits: width of a key code and of a value code, each 8, 4, 3 or 2.
        key_axis: "channel" or "token".
        scaling: factor on the scores.
        mask: boolean `[B | 1, Hkv | 1, S, N + M]`, True where a query may look; None for everything.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        n_packed: `N`, where `keys` and `values` have spare rows behind those; all of their rows by default.

    Returns:
        The output `[B, Hq, S, Dv]` in the dtype of `q` and the natural log-sum-exp of the scores, scaled and capped,
        `[B, Hq, S]` in float32 (float64 for float64 queries). A query that sees nothing gets zeros and `-inf`.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    n_packed = keys[0].shape[2] if n_packed is None else n_packed
    if tail_k is None:
        tail_k, tail_v = (q.new_empty(*keys[0].shape[:2], 0, n) for n in (q.shape[-1], packed_width(values, bits[1])))
    check_operands(q, tail_k, tail_v, mask, n_packed + tail_k.shape[2])
    _check_packed("keys", keys, q.shape[0], q.shape[-1], bits[0], n_packed)
    _check_packed("values", values, q.shape[0], tail_v.shape[-1], bits[1], n_packed)
    run = select("quant_attention", q.device, (q, keys, values, bits, key_axis))
    form = {"bits": bits, "key_axis": key_axis, "n_packed": n_packed}
    return run(q, keys, values, tail_k, tail_v, scaling=scaling, mask=mask, softcap=softcap, **form)


def packed_width(packed: Packed, bits: int) -> int:
    """Channels of packed rows."""
    return packed[0].shape[-1] * 16 // bits


def _check_packed(name, packed, batch, width, bits, n_packed):
    codes, scale, zero = packed
    words = width * bits // 16
    found, _, n_rows, n_words = codes.shape
    if codes.dtype != torch.int16 or n_rows < n_packed or n_words != words or found != batch:
        wanted = f"[B, Hkv, {n_packed}, {words}]"
        raise ValueError(f"{name}: codes must be int16 {wanted}, got {codes.dtype} {list(codes.shape)}")
    if scale.dtype != torch.float16 or scale.shape != zero.shape:
        raise ValueError(f"{name}: scale and zero must be float16 of one shape")
