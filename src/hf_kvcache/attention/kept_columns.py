"""Masks of layers that have evicted: the columns of the rows that are left."""

from __future__ import annotations

import torch

from hf_kvcache.attention.mask import KVMask, check_tokens, is_only_causal, without_bias


def mask_of_kept(view, mask, n_new: int) -> torch.Tensor:
    """The columns of a mask that belong to the rows of a layer that has evicted, `[B, Hkv, S, N]` in view order."""
    positions, T = view.positions, view.tokens_seen
    if is_only_causal(mask):
        return visible(positions, T, n_new)
    if isinstance(mask, KVMask) and mask.is_causal:
        check_tokens(mask.padding, view)
        return visible(positions, T, n_new) & _columns(mask.padding[:, None, None], positions)
    dense = mask.dense() if isinstance(mask, KVMask) else without_bias(mask)
    if dense is None:
        return visible(positions, T, n_new)
    check_tokens(dense, view)
    has_gaps = view.layer.store.is_ragged and view.layer.store.n_packed
    is_plain = n_new > 1 and dense.dtype == torch.bool and not has_gaps and not view.layer.has_padding
    if is_plain and dense[..., : T - n_new].all():
        # nothing older is hidden, whichever rows are left of it: one mask serves all heads
        older = dense.new_ones(*dense.shape[:3], view.n_kept - n_new)
        return torch.cat([older, dense[..., T - n_new :]], -1)
    return _columns(dense, positions)


def _columns(mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The columns of `mask` `[B | 1, H, S, T]` at `positions` `[B, Hkv, N]`; padding (-1) is hidden."""
    if mask.shape[1] > positions.shape[1]:
        positions = positions.repeat_interleave(mask.shape[1] // positions.shape[1], 1)
    B, H, N = positions.shape
    at = positions.clamp(min=0).long().unsqueeze(2).expand(B, H, mask.shape[2], N)
    columns, is_real = mask.expand(B, H, -1, -1).gather(3, at), (positions >= 0).unsqueeze(2)
    return columns & is_real if mask.dtype == torch.bool else columns.masked_fill(~is_real, torch.finfo(mask.dtype).min)


def visible(positions: torch.Tensor, tokens_seen: int, n_new: int) -> torch.Tensor:
    """Causal mask from positions `[B, Hkv, N]` (-1 is never seen): boolean `[B, Hkv, S, N]`."""
    queries = torch.arange(tokens_seen - n_new, tokens_seen, device=positions.device)
    rows = positions.unsqueeze(2)
    return (rows >= 0) & (rows <= queries.view(-1, 1))
