"""TOVA: keep the tokens that the newest query attends to."""

from __future__ import annotations

from dataclasses import dataclass

from hf_kvcache.policies.base import Policy
from hf_kvcache.policies.weights import newest_mass


@dataclass
class TOVA(Policy):
    """Evict the tokens that the newest query attends to least, over all heads (TOVA, arXiv 2401.06104).

    The score is the newest query's attention weight, averaged over the query heads of the layer, so that all heads of
    a layer keep the same tokens; every row of the batch keeps its own. The paper evicts at every step, which is
    `interval=1`, and protects nothing, which is `n_sink=0, n_recent=0`.
    """

    needs = frozenset({"model"})
    n_queries = 1

    def score(self, view):  # -> [B, Hkv, N]
        mass = newest_mass(view, 1)
        return self.shard.mean(mass.mean(1, keepdim=True)).expand_as(mass)
