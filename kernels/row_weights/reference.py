"""The definition of `row_weights`, in plain PyTorch: the softmax of a block of queries after another."""

from __future__ import annotations

import torch

SCORES = 1 << 20  # that are made at a time, if that is more than one query


def unavailable(device) -> None:
    return None


def row_weights(q, k, positions, first, *, scaling, softcap=None, q_is_real=None, reduce="sum"):
    B, Hkv, N, _ = k.shape
    queries, k = q.unflatten(1, (Hkv, -1)), k.float()  # [B, Hkv, G, S, D]
    found = k.new_zeros(B, Hkv, N)
    at_once = max(SCORES // max(B * q.shape[1] * N, 1), 1)
    for at in range(0, q.shape[2], at_once):
        part = queries[:, :, :, at : at + at_once].float() * scaling
        scores = (part.flatten(2, 3) @ k.mT).unflatten(2, part.shape[2:4])  # [B, Hkv, G, s, N]
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        where = torch.arange(first + at, first + at + part.shape[3], device=k.device).view(-1, 1)
        is_seen = (positions >= 0).unsqueeze(2) & (positions.unsqueeze(2) <= where)  # [B, Hkv, s, N]
        if q_is_real is not None:
            is_seen = is_seen & q_is_real[:, :, at : at + at_once].unsqueeze(3)
        weights = scores.masked_fill(~is_seen.unsqueeze(2), float("-inf")).softmax(-1)
        # the softmax over nothing is no number
        weights = weights.masked_fill(~is_seen.unsqueeze(2), 0)
        if reduce == "sum":
            found += weights.sum(3).mean(2)
        else:
            found = torch.maximum(found, weights.amax((2, 3)))
    return found
