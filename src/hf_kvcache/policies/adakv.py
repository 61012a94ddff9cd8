"""Ada-KV: heads of a layer share one budget."""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import pad

from hf_kvcache.policies.ragged import Ragged, best_of_all
from hf_kvcache.policies.wrapper import Wrapper


@dataclass
class AdaKV(Wrapper, Ragged):
    """Share a layer's budget among its heads: its best-scored rows stay, whosever they are (Ada-KV, arXiv 2407.11550).

    A head whose attention is spread out keeps more, one that looks at few tokens keeps fewer; together they keep
    `Hkv * budget`.

    Attributes:
        floor: share of `budget` that every head keeps in any case, of its own best rows.
    """

    floor: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise ValueError(f"AdaKV: floor={self.floor} is not in [0, 1]")

    @property
    def needs(self):
        return self.scorer.needs | {"model"}

    def for_model(self, context):
        bound = super().for_model(context)
        bound.shard = context.shard
        return bound

    def tokens_to_keep(self, tokens_seen):
        # layers may have budgets of their own
        return self.scorer.tokens_to_keep(tokens_seen)

    def keeps_all(self, n_kept, tokens_seen):
        # the heads of other processes may hold more rows
        return self.shard.count == 1 and n_kept <= self.tokens_to_keep(tokens_seen)

    def is_protected(self, positions, tokens_seen):
        return self.scorer.is_protected(positions, tokens_seen)

    def select(self, scores, positions, tokens_seen, n_fixed, is_final=True):
        masked = self.masked_scores(scores, positions, tokens_seen)
        n_own = masked.shape[-1] - n_fixed
        # the heads of other processes may hold more rows
        n_free = self.shard.largest(n_own, masked.device)
        free = pad(masked[..., :n_own], (0, n_free - n_own), value=float("-inf"))
        n_keep = min(max(self.tokens_to_keep(tokens_seen) - n_fixed, 0), n_free)
        safe = free.topk(min(round(self.floor * self.tokens_to_keep(tokens_seen)), n_keep), -1).indices
        free = free.scatter(-1, safe, float("inf"))
        is_wanted = best_of_all([free], [n_keep], self.shard)[0]
        is_wanted = pad(is_wanted[..., :n_own], (0, n_fixed), value=True)
        return self.keep_only(is_wanted, positions, tokens_seen, n_fixed)
