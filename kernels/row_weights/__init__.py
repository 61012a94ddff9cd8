"""How much of the softmax attention of some queries each row of a cache gets."""

from __future__ import annotations

import torch

from hf_kvcache.kernels import select

__all__ = ["REDUCTIONS", "row_weights"]

REDUCTIONS = ("sum", "max")


def row_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    first: int,
    *,
    scaling: float,
    softcap: float | None = None,
    q_is_real: torch.Tensor | None = None,
    reduce: str = "sum",
) -> torch.Tensor:
    """Attention weights of queries over dense rows, joined over the queries and the heads of a group.

    Query `i` stands at position `first + i` and sees the rows whose position is not after its own; its weights are the
    softmax over those. One that sees nothing gives nothing. Arithmetic in float32, whatever the operands.

    Args:
        q: queries `[B, Hq, S, D]`, any floating dtype.
        k: keys `[B, Hkv, N, D]`, any floating dtype.
        positions: of the rows, int32 or int64 `[B, Hkv, N]`, in any order and with gaps; -1 for padding, which no query
            sees.
        first: position of the first query; they stand one after another.
        scaling: factor on the scores.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2, section 2).
        q_is_real: False for queries that give nothing, boolean `[B, 1 | Hkv, S]`; None when all give.
        reduce: "sum" over the queries, then the mean over the heads of a group (H2O, arXiv 2306.14048); or "max", the
            largest weight of all of them (KVzip, arXiv 2505.23416).

    Returns:
        float32 `[B, Hkv, N]`, 0 for rows that no query sees.

    Raises:
        ValueError: shapes or dtypes do not fit together, or there is no such reduction.
    """
    check_operands(q, k, positions, q_is_real, reduce)
    run = select("row_weights", q.device, (q, k))
    return run(q, k, positions, first, scaling=scaling, softcap=softcap, q_is_real=q_is_real, reduce=reduce)


def check_operands(q, k, positions, q_is_real, reduce):
    fits = q.dim() == k.dim() == 4 and q.shape[::3] == k.shape[::3] and k.shape[1] and not q.shape[1] % k.shape[1]
    if not fits:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must be [B, Hq, S, D] and [B, Hkv, N, D]")
    if positions.shape != k.shape[:3] or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"positions must be int32 or int64 {list(k.shape[:3])}, got {positions.dtype} {list(positions.shape)}"
        )
    if q_is_real is not None:
        B, H, S = q.shape[0], k.shape[1], q.shape[2]
        if q_is_real.dtype != torch.bool or tuple(q_is_real.shape) not in ((B, 1, S), (B, H, S)):
            got = f"{q_is_real.dtype} {list(q_is_real.shape)}"
            raise ValueError(f"q_is_real must be bool [{B}, 1|{H}, {S}], got {got}")
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r} is not one of {', '.join(REDUCTIONS)}")
