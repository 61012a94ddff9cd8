"""The definition of the sparse row format, in plain PyTorch (layout: README.md of this folder)."""

from __future__ import annotations

import torch

ROWS = 4096  # rows sorted at a time: 64-bit indices take four times the room of the rows


def unavailable(device) -> None:
    return None


def sparse_pack(x, *, keep, layout, group_size=None, importance=None):
    importance = x if importance is None else importance
    blocks = [
        _pack(rows, keep, layout, group_size, weight)
        for rows, weight in zip(x.split(ROWS, 2), importance.split(ROWS, 2), strict=True)
    ]
    return tuple(torch.cat(parts, 2) for parts in zip(*blocks))


def _pack(x, keep, layout, group_size, importance):
    D = x.shape[-1]
    group_size = group_size or D
    # NaN is the largest, and a stable sort gives ties to the lower channel
    worth = importance.abs().double().nan_to_num(nan=float("inf"), posinf=torch.finfo(torch.float64).max)
    order = worth.unflatten(-1, (-1, group_size)).sort(dim=-1, descending=True, stable=True).indices
    first = torch.arange(0, D, group_size, device=x.device).unsqueeze(-1)
    index = (order[..., : keep * group_size // D] + first).flatten(-2).sort(dim=-1).values  # [B, H, n, keep]
    values = x.gather(-1, index)
    return values, index.to(torch.uint8) if layout == "index" else to_bitmap(index, D)


def sparse_unpack(values, places, *, layout, head_dim):
    index = places.long() if layout == "index" else from_bitmap(places, values.shape[-1])
    return values.new_zeros(*values.shape[:-1], head_dim).scatter_(-1, index, values)


def to_bitmap(index, head_dim):
    """Channel numbers int64 `[..., k]` to bitmaps uint8 `[..., ceil(D / 8)]`."""
    n_bytes = -(-head_dim // 8)
    bits = torch.zeros(*index.shape[:-1], n_bytes * 8, dtype=torch.uint8, device=index.device).scatter_(-1, index, 1)
    place = torch.arange(8, dtype=torch.uint8, device=index.device)
    return (bits.unflatten(-1, (n_bytes, 8)) << place).sum(-1, dtype=torch.uint8)


def from_bitmap(bitmap, keep):
    """Bitmaps with `keep` bits set each to ascending channel numbers, int64 `[..., keep]`."""
    place = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    bits = ((bitmap.unsqueeze(-1) >> place) & 1).flatten(-2)  # [..., 8 * bytes]
    # a stable sort brings the set bits to the front in their order
    return bits.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
