"""Rows of a batch, as callers of transformers name them."""

from __future__ import annotations

import torch


def batch_indices(indices, batch_size: int) -> torch.Tensor:
    """Rows of a batch as int64 `[B']`.

    Args:
        indices: integers, as a tensor, list or tuple; or a boolean mask `[B]`.
        batch_size: `B`; negative while it is not known.

    Raises:
        IndexError: there is no such row, or the mask has another size.
        TypeError: something else was given.
    """
    indices = torch.as_tensor(indices)
    if indices.dtype == torch.bool:
        if batch_size >= 0 and indices.shape != (batch_size,):
            raise IndexError(f"a mask of {list(indices.shape)} rows for a batch of {batch_size}")
        return indices.nonzero().flatten()
    if indices.is_floating_point() or indices.is_complex() or indices.dim() != 1:
        raise TypeError(f"rows of a batch are integers or a boolean mask, not {indices.dtype} {list(indices.shape)}")
    # a GPU would have to be waited for at every step of a beam search, whose indices are right
    if batch_size >= 0 and indices.device.type == "cpu" and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if not -batch_size <= low <= high < batch_size:
            raise IndexError(f"row {low if low < -batch_size else high} of a batch of {batch_size}")
        return indices.long() % batch_size
    return indices.long()
