"""NACL: keep what the proxy tokens attend to, and a random share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_kvcache.policies.base import topk_indices
from hf_kvcache.policies.random import uniform
from hf_kvcache.policies.window import WindowPolicy


@dataclass
class NACL(WindowPolicy):
    """Keep the proxy tokens' choice, and draw the rest (NACL, arXiv 2408.03675).

    The score is the summed attention of the newest `n_queries` queries, the proxies, which stay: a question at the end
    of the prompt. Of the rows that are left to choose, a part are the best-scored ones; the others are drawn without
    replacement with probabilities softmax(score), head by head, which is to take the largest of score + Gumbel noise.
    Draws depend on `seed`, layer, head and tokens seen, and are the same for all rows of a batch and on any device.
    The paper evicts after the prompt only, which is `decode=False`.

    Attributes:
        n_queries: the newest queries that are asked, and stay (the paper's proxy tokens).
        random_share: share of the rows to choose that are drawn.
        seed: of the draws.
    """

    random_share: float = 2 / 3
    seed: int = 0
    layer_idx: int = field(default=0, init=False, repr=False, compare=False)

    needs = frozenset({"model"})

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.random_share <= 1:
            raise ValueError(f"NACL: random_share={self.random_share} is not in [0, 1]")

    def for_model(self, context):
        bound = super().for_model(context)
        bound.layer_idx = context.layer_idx
        return bound

    def score(self, view):  # -> [B, Hkv, N]
        return self.votes(view)

    def select(self, scores, positions, tokens_seen, n_fixed, is_final=True):
        masked = self.masked_scores(scores, positions, tokens_seen)
        n_keep, n_free = self.tokens_to_keep(tokens_seen), scores.shape[-1] - n_fixed
        n_drawn = int(self.random_share * (n_keep - self.n_sink - self.n_recent))
        n_keep = max(n_keep - n_fixed, 0)
        n_top = min(max(n_keep - n_drawn, 0), n_free)
        top = masked[..., :n_free].topk(n_top, dim=-1, sorted=False).indices
        noise = uniform((self.seed, self.layer_idx, tokens_seen), scores, self.shard)
        gumbel = -torch.log(-torch.log(noise))
        return topk_indices((masked + gumbel).scatter(-1, top, float("inf")), n_keep, n_fixed)
