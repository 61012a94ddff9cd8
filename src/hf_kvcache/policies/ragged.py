"""What policies have in common that let heads keep different numbers of rows."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from hf_kvcache.codecs.base import ROWS
from hf_kvcache.policies.base import Policy
from hf_kvcache.shards import Shard
from hf_kvcache.stores.ragged import RaggedStore
from hf_kvcache.stores.uniform import PACK_STEP


class Ragged(Policy):
    """Heads choose for themselves how many rows they keep; `select` returns a boolean mask."""

    is_ragged = True

    def store_type(self):
        return RaggedStore

    def check_cache(self, cache) -> None:
        super().check_cache(cache)
        check_pages(self, cache)
        n_dense = cache.window + PACK_STEP
        if self.budget is not None and self.budget < n_dense + self.n_sink:
            raise ValueError(
                f"{type(self).__name__}: budget={self.budget} leaves nothing to choose beside up to {n_dense} dense "
                f"rows (window={cache.window} + {PACK_STEP} waiting) and {self.n_sink} sinks; raise it or lower window"
            )

    def should_evict(self, n_kept, tokens_seen, decoding, n_since):
        # the longest head says nothing of the others: the prompt is looked at once, decoding every `interval` tokens
        if decoding:
            return self.decode and n_since >= self.interval
        return n_since > 0

    def all_stay(self, view, kept: torch.Tensor) -> bool:
        """Whether no row goes, as far as that can be told without waiting for a device in a step of decoding."""
        store = view.layer.store
        return self.keeps_all(store.n_kept, view.tokens_seen) or store.all_stay(kept, view.positions)

    def keeps_all(self, n_kept: int, tokens_seen: int) -> bool:
        """Whether nothing can go, whatever scores are, of heads that have up to `n_kept` rows each."""
        return n_kept <= self.n_sink + self.n_recent

    def keep_only(
        self, is_wanted: torch.Tensor, positions: torch.Tensor, tokens_seen: int, n_fixed: int
    ) -> torch.Tensor:
        """`is_wanted` `[B, Hkv, N]`, and what must stay: sinks, recent tokens, the last `n_fixed` rows. No padding."""
        is_kept = is_wanted | self.is_protected(positions, tokens_seen)
        is_kept[..., positions.shape[-1] - n_fixed :] = True
        return is_kept & (positions >= 0)


def best_of_all(scores: list[torch.Tensor], n_each: list[int], shard: Shard) -> list[torch.Tensor]:
    """The best rows of heads that share a budget, whosever they are.

    Args:
        scores: of the heads of some layers that this process has, `[B, Hkv, N]` each.
        n_each: rows to keep per head of each layer, on average.
        shard: which of the heads of all processes those are.

    Returns:
        Boolean `[B, Hkv, N]` for each.
    """
    # the heads of other processes may hold more rows
    widths = [shard.largest(own.shape[-1], own.device) for own in scores]
    whole = [shard.all_heads(pad(x, (0, n - x.shape[-1]), value=float("-inf")), 1) for x, n in zip(scores, widths)]
    flat = torch.cat([x.flatten(1).to(scores[0].device) for x in whole], 1)
    n_keep = sum(x.shape[1] * min(n, x.shape[2]) for x, n in zip(whole, n_each))
    best = flat.topk(n_keep, -1, sorted=False).indices
    is_best = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best, True)
    parts = is_best.split([x[0].numel() for x in whole], 1)
    parts = [part.view_as(x).to(x.device) for part, x in zip(parts, whole)]
    return [shard.local_shard(part, 1)[..., : own.shape[-1]] for part, own in zip(parts, scores)]


def check_pages(policy: Policy, cache) -> None:
    """Refuse what does not go with rows in pages.

    Raises:
        ValueError: a codec whose rows do not serve any head, or an option about rows that all heads have.
    """
    name = type(policy).__name__
    for side in cache.all_codecs:
        if side.format not in ROWS:
            raise ValueError(
                f"{name} lets heads keep different numbers of rows, in pages that serve any head, which rows of "
                f"{side} do not"
            )
    for what in ("n_sink", "min_length"):
        if n := getattr(cache, what):
            raise ValueError(f"{name}: {what}={n} of the cache does not go with pages; the policy has its own n_sink")
