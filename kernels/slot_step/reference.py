"""The definition of `slot_step`."""

from __future__ import annotations

import torch


def unavailable(device) -> None:
    return None


def slot_step(alpha, is_real, ring, lengths, position):
    n_cells = ring.shape[-1]
    is_real = torch.ones_like(alpha) if is_real is None else is_real.unsqueeze(-1).expand_as(alpha)
    before, cell = ring[..., (position - 1) % n_cells], ring[..., position % n_cells]
    before |= (alpha & is_real & (before >= 0)).int()
    # with one cell both are the same, so what was just condemned is taken at once
    is_free = (cell >= 0) & (cell % 2 == 1)
    row = torch.where(is_free, cell // 2, lengths)
    lengths += (is_real & ~is_free).int()
    row = torch.where(is_real, row, -1)
    cell.copy_(torch.where(is_real, 2 * row, torch.where(is_free, cell, -1)))
    return row
