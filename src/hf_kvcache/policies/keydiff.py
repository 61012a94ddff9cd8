"""KeyDiff: keep the keys that differ most from the mean key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity, normalize

from hf_kvcache.policies.base import Policy


@dataclass
class KeyDiff(Policy):
    """Evict keys that point where the average key points (KeyDiff, arXiv 2504.15364, section 3.2).

    The score is minus the cosine between a key and the mean of the normalised keys of its head.
    """

    def score(self, view):  # -> [B, Hkv, N]
        is_padding = (view.positions < 0).unsqueeze(-1)  # [B, Hkv, N, 1]
        keys = torch.cat(list(view.key_blocks()), 2).float()
        anchor = normalize(keys, dim=-1).masked_fill(is_padding, 0).sum(2, keepdim=True)
        return -cosine_similarity(keys, anchor, dim=-1)
