"""Ragged attention through the op for uniform lengths: a page is a batch row of one head."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.merge_states import merge_states
from hf_kvcache.kernels.merge_states.triton_kernel import merge_ragged_partials

CHUNK = 32768  # pages at a time: a grid has 65,535 batch rows at most


def by_page(run, q, keys, values, table, lengths, *, scaling, softcap=None):
    """Attend to every page with the queries of its head, and merge what belongs to one head by log-sum-exp.

    Whole pages are read where they lie. The last page of a head is copied, with zeros for what is behind its end.

    Args:
        run: `sparse_attention` of a backend; the other arguments are those of `ragged_attention`.
    """
    B, Hq, S, _ = q.shape
    width = values.row_width(q.shape[-1])
    n_heads, (n_pages, _, page, _) = lengths.numel(), keys.values.shape
    if n_pages * table.shape[2] == 0:
        return q.new_zeros(B, Hq, S, width), q.new_full((B, Hq, S), float("-inf"), dtype=torch.float32)
    heads = q.reshape(n_heads, Hq // lengths.shape[1], *q.shape[2:])
    n_whole = lengths // page
    owner = _owners(table, n_whole, n_pages)
    written = [_without_stray_places(side, owner) for side in (keys, values)]
    parts = []
    for start in range(0, n_pages, CHUNK):
        pages = slice(start, start + CHUNK)
        sides = (_each(side, lambda x, pages=pages: x[pages]) for side in written)
        parts.append(run(heads[owner[pages].clamp(min=0)], *sides, scaling=scaling, softcap=softcap))
    out, lse = (torch.cat(x) if len(parts) > 1 else x[0] for x in zip(*parts))
    whole = merge_ragged_partials(out.flatten(1, 2), lse.flatten(1, 2), n_whole, 1, q, order=table)
    # the page behind the whole ones, any page where there is none
    is_row = torch.arange(page, device=q.device) < (lengths % page).reshape(-1, 1)  # [B * Hkv, page]
    last = table.gather(2, n_whole.clamp(max=table.shape[2] - 1).unsqueeze(2).long()).flatten()
    last = torch.where(is_row[:, 0], last, 0)
    sides = (_each(side, lambda x: x[last].masked_fill(~is_row[:, None, :, None], 0)) for side in (keys, values))
    mask = is_row[:, None, None].expand(-1, -1, S, -1)
    out, lse = run(heads, *sides, scaling=scaling, softcap=softcap, mask=mask)
    return merge_states([whole, (out.view(B, Hq, S, width), lse.view(B, Hq, S))])


def _owners(table, n_whole, n_pages):
    """The inverse of the table `[P]`: number of the head whose whole page it is, -1 for any other page."""
    head = torch.arange(n_whole.numel(), device=table.device).view(*n_whole.shape, 1).expand_as(table)
    is_whole = torch.arange(table.shape[2], device=table.device) < n_whole.unsqueeze(2)
    owner = torch.full((n_pages + 1,), -1, device=table.device)
    # entries that are no pages meet at the end, which is cut off
    return owner.scatter_(0, torch.where(is_whole, table, n_pages).flatten().long(), head.flatten())[:n_pages]


def _without_stray_places(side, owner):
    """The side with places of zero where nothing was written: kernels take places for addresses."""
    if side.places is None:
        return side
    return side._replace(places=side.places.masked_fill((owner < 0).view(-1, 1, 1, 1), 0))


def _each(side, function):
    fields = {name: getattr(side, name) for name in ("values", "places", "scale", "zero")}
    return side._replace(**{name: None if x is None else function(x) for name, x in fields.items()})
