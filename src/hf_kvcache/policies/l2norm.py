"""L2Norm: keep the keys of small norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_kvcache.policies.base import Policy


@dataclass
class L2Norm(Policy):
    """Evict keys of large norm: those of small norm get the attention (Devoto et al. 2024, arXiv 2406.11430).

    The score is `-||k||`. Needs no queries. The paper leaves the first two layers whole; here every layer evicts.
    """

    def score(self, view):  # -> [B, Hkv, N]
        return -torch.cat([k.float().norm(dim=-1) for k in view.key_blocks()], 2)
