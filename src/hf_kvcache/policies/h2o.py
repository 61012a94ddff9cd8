"""H2O: keep the tokens that have got the most attention so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_kvcache.policies.base import Policy
from hf_kvcache.policies.weights import attention_mass


@dataclass
class H2O(Policy):
    """Keep the heavy hitters of all past queries, and the recent tokens (H2O, arXiv 2306.14048).

    The score of a row is the sum of the attention weights that all queries since it came have given it, averaged over
    the query heads of its group. Weights are those over the rows that were kept at the time.

    Attention functions do not hand out their weights, so the scores of every call are computed a second time. Over
    dense rows on a CPU that is one pass (`kernels/row_weights`): a quarter of what attention costs at prefill, one to
    three times as much at a decoding step. Over packed rows, and on a GPU, it is `QK^T` twice, block by block, in
    PyTorch. 4 bytes per row and head hold the sums.

    Attributes:
        recent_share: share of the budget, sinks apart, that goes to recent tokens (at least `n_recent` of them).
    """

    recent_share: float = 0.5

    wants_queries = True
    state = {"mass": torch.float32}

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.recent_share <= 1:
            raise ValueError(f"H2O: recent_share={self.recent_share} is not in [0, 1]")

    def on_queries(self, q, view):
        queries = q.unflatten(1, (view.positions.shape[1], -1))  # [B, Hkv, G, S, D]
        mass = attention_mass(queries, view.tokens_seen - q.shape[2], view)
        view.set_state("mass", view.state("mass") + mass)

    def score(self, view):  # -> [B, Hkv, N]
        return view.state("mass")

    def is_protected(self, positions, tokens_seen):
        n_recent = int(self.recent_share * (self.tokens_to_keep(tokens_seen) - self.n_sink))
        is_recent = (positions >= 0) & (positions >= tokens_seen - n_recent)
        return super().is_protected(positions, tokens_seen) | is_recent
