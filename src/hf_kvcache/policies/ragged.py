"""What policies have in common that let heads keep different numbers of rows."""

from __future__ import annotations

import torch

from hf_kvcache.codecs.base import ROWS
from hf_kvcache.policies.base import Policy
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

    def keep_only(
        self, is_wanted: torch.Tensor, positions: torch.Tensor, tokens_seen: int, n_fixed: int
    ) -> torch.Tensor:
        """`is_wanted` `[B, Hkv, N]`, and what must stay: sinks, recent tokens, the last `n_fixed` rows. No padding."""
        is_kept = is_wanted | self.is_protected(positions, tokens_seen)
        is_kept[..., positions.shape[-1] - n_fixed :] = True
        return is_kept & (positions >= 0)


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
