"""Which row of its head a decoded token is written to, where heads overwrite rows that are not needed any more."""

from __future__ import annotations

import torch

from hf_kvcache.kernels import select

__all__ = ["slot_step"]


def slot_step(
    alpha: torch.Tensor, is_real: torch.Tensor | None, ring: torch.Tensor, lengths: torch.Tensor, position: int
) -> torch.Tensor:
    """Choose the row of a token: that of a condemned one whose time is up, or a new one.

    The decision of a token is about the one before it. A row that is decided against stays for `delay` more tokens, and
    is then taken by the token that comes: memory is used again without moving a row (DMS, Lancucki et al. 2025). With
    `delay` 0 that is DMC: a token that merges takes the newest row, which held the mean so far.

    Args:
        alpha: decisions of this token, boolean `[B, Hkv]`.
        is_real: rows of the batch whose token is no padding, boolean `[B]`; None when all are.
        ring: rows of the newest `delay + 1` tokens, int32 `[B, Hkv, delay + 1]`; the token at position `t` is in cell
            `t % (delay + 1)` as `2 * row + is_condemned`, or -1 where it has none. Written to.
        lengths: rows in use of every head, int32 `[B, Hkv]`. Written to.
        position: of this token in the text.

    Returns:
        The row, int32 `[B, Hkv]`; -1 for padding.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if ring.shape[:2] != alpha.shape or lengths.shape != alpha.shape or ring.dim() != 3:
        raise ValueError(
            f"alpha {list(alpha.shape)}, ring {list(ring.shape)} and lengths {list(lengths.shape)} must be [B, Hkv], "
            "[B, Hkv, delay + 1] and [B, Hkv]"
        )
    if {ring.dtype, lengths.dtype} != {torch.int32} or alpha.dtype != torch.bool:
        raise ValueError(f"ring {ring.dtype} and lengths {lengths.dtype} must be int32, alpha {alpha.dtype} bool")
    run = select("slot_step", alpha.device)
    return run(alpha, is_real, ring, lengths, position)
