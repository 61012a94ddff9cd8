"""Keep the largest channels of every row and store only those; put them back in their places."""

from __future__ import annotations

import torch

from hf_kvcache.kernels import select
from hf_kvcache.kernels.sparse_pack import reference

__all__ = ["LAYOUTS", "sparse_pack", "sparse_unpack"]

LAYOUTS = ("bitmap", "index")
MAX_CHANNELS = 256  # an index is one byte


def sparse_pack(
    x: torch.Tensor, *, keep: int, layout: str, group_size: int | None = None, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token top-k by magnitude (Mustafar, arXiv 2505.22913, section 2), in rows of a fixed size.

    Exactly `keep` channels stay, ties going to the lower channel; NaN counts as larger than infinity, so that it is
    not hidden.

    Args:
        x: rows `[B, H, n, D]`, float16, bfloat16, float32 or float64, `D <= 256`.
        keep: channels that stay, `1 <= keep <= D`.
        layout: "bitmap" or "index" (README.md).
        group_size: keep an equal share of every group of this many adjacent channels (4 and `keep = D / 2` is the
            2:4 pattern); None chooses among the whole row.
        importance: choose by the magnitude of this instead, `[B, H, n, D]`, any floating dtype; None means `x` itself.

    Returns:
        values: the kept channels in ascending order, `[B, H, n, keep]` in the dtype of `x`.
        places: where they belong, uint8: `[B, H, n, ceil(D / 8)]` with bit `j` of byte `c` for channel `8c + j`
            ("bitmap"), or `[B, H, n, keep]`, the channel numbers ("index").

    Raises:
        ValueError: keep, layout, group size or shapes do not fit.
    """
    check_format(x.shape[-1], keep, layout, group_size)
    if importance is not None and importance.shape != x.shape:
        raise ValueError(f"importance {list(importance.shape)} must have the shape of x {list(x.shape)}")
    run = select("sparse_pack", x.device, (x, keep, layout, group_size, importance))
    return run(x, keep=keep, layout=layout, group_size=group_size, importance=importance)


def sparse_unpack(values: torch.Tensor, places: torch.Tensor, *, layout: str, head_dim: int) -> torch.Tensor:
    """Rows `[B, H, n, head_dim]` in the dtype of `values`, zero where a channel was dropped."""
    return reference.sparse_unpack(values, places, layout=layout, head_dim=head_dim)


def check_format(head_dim: int, keep: int, layout: str, group_size: int | None = None) -> None:
    """Raise ValueError unless rows of `head_dim` channels can be packed this way."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not one of {', '.join(LAYOUTS)}")
    if head_dim > MAX_CHANNELS:
        raise ValueError(f"sparse rows have at most {MAX_CHANNELS} channels, these have {head_dim}")
    if not 1 <= keep <= head_dim:
        raise ValueError(f"keep={keep} is not between 1 and the head size {head_dim}")
    if group_size is not None and (head_dim % group_size or keep * group_size % head_dim):
        raise ValueError(f"groups of {group_size} channels cannot share keep={keep} of {head_dim} channels equally")
