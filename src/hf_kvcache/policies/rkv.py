"""R-KV: keep the tokens that are attended to and not said twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from hf_kvcache.policies.window import WindowPolicy, check_kernel, pool

KEYS = 64  # keys that are compared with all others at a time


@dataclass
class RKV(WindowPolicy):
    """Trade importance against redundancy (R-KV, arXiv 2505.24133), for reasoning models that repeat themselves.

    The score is `mix * importance - (1 - mix) * redundancy`. Importance is the mean attention of the newest `n_queries`
    queries, max-pooled over neighbouring rows. Redundancy is a softmax over the keys of their mean cosine with all
    keys of the head. A key does not count its resemblance to the newest key that is like it (a cosine above
    `threshold`), so that the last of several repetitions stays.

    The mean cosine alone is the dot product of a unit key and the mean unit key, `O(N D)`; that is `threshold=None`.
    With a threshold keys are compared one by one, `O(N^2 D)`, in blocks. The published code exempts the first row
    where a key has none that is like it, and takes the group's largest score instead of the mean weight; ours
    does neither.

    Attributes:
        n_queries: the newest queries that are asked, and stay (the paper's observation tokens).
        mix: weight of importance (the paper's lambda).
        kernel: rows over which importance is pooled.
        threshold: cosine above which keys are alike; None for none.
    """

    n_queries: int = 8
    mix: float = 0.1
    kernel: int = 7
    threshold: float | None = 0.5

    def __post_init__(self):
        super().__post_init__()
        check_kernel(self, self.kernel)
        if not 0 <= self.mix <= 1:
            raise ValueError(f"RKV: mix={self.mix} is not in [0, 1]")

    def score(self, view):  # -> [B, Hkv, N]
        is_real = view.positions >= 0
        importance = pool(self.votes(view) / self.n_queries, view.positions, self.kernel)
        keys = torch.cat([normalize(k.float(), dim=-1) for k in view.key_blocks()], 2)
        keys = keys.masked_fill(~is_real.unsqueeze(-1), 0.0)
        total = (keys @ keys.sum(2).unsqueeze(-1)).squeeze(-1) - keys.square().sum(-1)
        if self.threshold is not None:
            total = total - self._exempt(keys, view.positions)
        mean = total / is_real.sum(-1, keepdim=True).clamp(min=1)
        redundancy = mean.masked_fill(~is_real, float("-inf")).softmax(-1).nan_to_num(0.0)
        return self.mix * importance - (1 - self.mix) * redundancy

    def _exempt(self, keys, positions):
        """What every key resembles those of which it is the newest like one, summed; `[B, Hkv, N]`."""
        n = keys.shape[2]
        exempt = torch.zeros(keys.shape[:3], device=keys.device)
        for start in range(0, n, KEYS):
            cosine = keys[:, :, start : start + KEYS] @ keys.mT  # [B, Hkv, n, N]
            is_alike = cosine > self.threshold
            is_alike.diagonal(start, 2, 3).fill_(False)
            newest = torch.where(is_alike, positions.unsqueeze(2), -1).max(-1, keepdim=True)
            found = cosine.gather(-1, newest.indices).masked_fill(newest.values < 0, 0.0)
            exempt.scatter_add_(-1, newest.indices.squeeze(-1), found.squeeze(-1))
        return exempt
