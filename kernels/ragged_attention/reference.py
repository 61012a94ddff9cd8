"""The definition of `ragged_attention`: look pages up, expand them, hide what is behind the end of a head, attend."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.online_softmax import OnlineSoftmax
from hf_kvcache.kernels.sparse_attention.reference import expand

PAGES = 16  # pages per head that are expanded at a time


def unavailable(device) -> None:
    return None


def ragged_attention(q, keys, values, table, lengths, tail_k=None, tail_v=None, *, scaling, mask=None, softcap=None):
    page, n_heads = keys.values.shape[2], lengths.shape[1]
    widths = [side.row_width(q.shape[-1]) for side in (keys, values)]
    state = OnlineSoftmax(q, n_heads, scaling, softcap, widths[1])
    n_pages = -(-int(lengths.max()) // page) if lengths.numel() else 0
    for first in range(0, n_pages, PAGES):
        held = table[:, :, first : min(first + PAGES, n_pages)]
        index = torch.arange(held.shape[2] * page, device=q.device) + first * page
        is_row = index < lengths.unsqueeze(-1)  # [B, Hkv, n]
        # entries behind the end of a head may be anything
        held = torch.where(is_row[..., ::page], held, 0).long()
        k, v = (_rows(side, held, is_row, width, q.dtype) for side, width in zip((keys, values), widths))
        state.add(k, v, is_row.unsqueeze(2).expand(-1, -1, q.shape[2], -1))
    if tail_k is not None and tail_k.shape[2]:
        state.add(tail_k, tail_v, mask)
    return state.result()


def _rows(side, held, is_row, head_dim, dtype):
    """The rows of the pages `held` `[B, Hkv, m]`, dense: `[B, Hkv, m * page, D]`, zeros behind the end of a head."""
    fields = {name: getattr(side, name) for name in ("values", "places", "scale", "zero")}
    picked = {name: None if t is None else t[held.flatten()] for name, t in fields.items()}
    if side.places is not None:
        # numbers of channels that do not exist cannot be expanded
        behind = ~is_row.reshape(-1, 1, side.places.shape[2], 1)
        picked["places"] = picked["places"].masked_fill(behind, 0)
    rows = expand(side._replace(**picked), slice(None), head_dim, dtype)  # [B * Hkv * m, 1, page, D]
    return rows.view(*is_row.shape, head_dim).masked_fill(~is_row.unsqueeze(-1), 0)
