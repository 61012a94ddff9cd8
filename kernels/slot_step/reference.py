"""The definition of `slot_step` and `place_rows`."""

from __future__ import annotations

import torch


def unavailable(device) -> None:
    return None


def slot_step(alpha, is_real, pending, lengths, position):
    n_cells = pending.shape[-1]
    is_real = torch.ones_like(alpha) if is_real is None else is_real.unsqueeze(-1).expand_as(alpha)
    before, cell = pending[..., (position - 1) % n_cells], pending[..., position % n_cells]
    before |= (alpha & is_real & (before >= 0)).int()
    # with one cell both are the same, so what was just condemned is taken at once
    is_free = (cell >= 0) & (cell % 2 == 1)
    row = torch.where(is_free, cell // 2, lengths)
    lengths += (is_real & ~is_free).int()
    row = torch.where(is_real, row, -1)
    cell.copy_(torch.where(is_real, 2 * row, torch.where(is_free, cell, -1)))
    return row


def place_rows(k, v, alpha, is_real, pending, lengths, position, k_pages, v_pages, table):
    row, page = slot_step(alpha, is_real, pending, lengths, position), k_pages.shape[2]
    entry = (row.clamp(min=0) // page).unsqueeze(-1).long()
    at = table.gather(2, entry).squeeze(-1).long() * page + row % page  # [B, Hkv]
    # picking by a mask would wait for the device
    is_row = slice(None) if is_real is None else row >= 0
    for x, pages in ((k, k_pages), (v, v_pages)):
        pages.flatten(0, 2)[at[is_row]] = x[:, :, 0][is_row]
