"""Which row of its head a decoded token is written to, where heads overwrite rows that are not needed any more."""

from __future__ import annotations

import torch

from hf_kvcache.kernels import select

__all__ = ["place_rows", "slot_step"]


def slot_step(
    alpha: torch.Tensor, is_real: torch.Tensor | None, pending: torch.Tensor, lengths: torch.Tensor, position: int
) -> torch.Tensor:
    """Choose the row of a token: that of a condemned one whose time is up, or a new one.

    The decision of a token is about the one before it. A row that is decided against stays for `delay` more tokens, and
    is then taken by the token that comes: memory is used again without moving a row (DMS, arXiv 2506.05345). With
    `delay` 0 that is DMC: a token that merges takes the newest row, which held the mean so far.

    Args:
        alpha: decisions of this token, boolean `[B, Hkv]`.
        is_real: rows of the batch whose token is no padding, boolean `[B]`; None when all are.
        pending: rows of the newest `delay + 1` tokens, int32 `[B, Hkv, delay + 1]`, a ring: the token at position `t`
            is in cell `t % (delay + 1)` as `2 * row + is_condemned`, or -1 where it has none. Written to.
        lengths: rows in use of every head, int32 `[B, Hkv]`. Written to.
        position: of this token in the text.

    Returns:
        The row, int32 `[B, Hkv]`; -1 for padding.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    check_slots(alpha, is_real, pending, lengths)
    return select("slot_step", alpha.device)(alpha, is_real, pending, lengths, position)


def place_rows(
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor,
    is_real: torch.Tensor | None,
    pending: torch.Tensor,
    lengths: torch.Tensor,
    position: int,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    table: torch.Tensor,
) -> None:
    """`slot_step`, and the rows of the token written where it says: one launch on a GPU.

    Args:
        k: dense row of the token, `[B, Hkv, 1, D]`.
        v: likewise; its head size may be another.
        alpha, is_real, pending, lengths, position: see `slot_step`.
        k_pages: pages in the dtype of `k`, contiguous `[P, 1, page, D]`. Written to, but not for padding.
        v_pages: likewise of `v`, with the same `P` and `page`.
        table: pages of every head in the order of its rows, int32 `[B, Hkv, M]`; there is one for a new row.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    check_places(k, v, alpha, is_real, pending, lengths, k_pages, v_pages, table)
    place = select("slot_step", alpha.device, name="place_rows")
    place(k, v, alpha, is_real, pending, lengths, position, k_pages, v_pages, table)


def check_slots(alpha, is_real, pending, lengths):
    if pending.dim() != 3 or pending.shape[:2] != alpha.shape or lengths.shape != alpha.shape or not pending.shape[2]:
        raise ValueError(
            f"alpha {list(alpha.shape)}, pending {list(pending.shape)} and lengths {list(lengths.shape)} must be "
            "[B, Hkv], [B, Hkv, delay + 1] and [B, Hkv]"
        )
    if {pending.dtype, lengths.dtype} != {torch.int32} or alpha.dtype != torch.bool:
        raise ValueError(f"pending {pending.dtype} and lengths {lengths.dtype} must be int32, alpha {alpha.dtype} bool")
    if is_real is not None and (is_real.shape != alpha.shape[:1] or is_real.dtype != torch.bool):
        raise ValueError(
            f"is_real {is_real.dtype} {list(is_real.shape)} must be bool [B], alpha is {list(alpha.shape)}"
        )


def check_places(k, v, alpha, is_real, pending, lengths, k_pages, v_pages, table):
    check_slots(alpha, is_real, pending, lengths)
    for name, x, pages in (("k", k, k_pages), ("v", v, v_pages)):
        fits = x.shape[:3] == (*alpha.shape, 1) and pages.shape[1::2] == (1, x.shape[3]) and pages.dtype == x.dtype
        if not fits or not pages.is_contiguous():
            raise ValueError(
                f"{name} {x.dtype} {list(x.shape)} must be [B, Hkv, 1, D], its pages {pages.dtype} "
                f"{list(pages.shape)} contiguous [P, 1, page, D] of the same dtype"
            )
    if k_pages.shape[:3] != v_pages.shape[:3] or table.shape[:2] != alpha.shape or table.dtype != torch.int32:
        raise ValueError(
            f"pages {list(k_pages.shape)} and {list(v_pages.shape)} must be as many, table {table.dtype} "
            f"{list(table.shape)} int32 [B, Hkv, M]"
        )
