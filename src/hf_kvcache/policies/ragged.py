"""What policies have in common that let heads keep different numbers of rows."""

from __future__ import annotations

import torch

from hf_kvcache.policies.base import Policy


class Ragged(Policy):
    """Heads choose for themselves how many rows they keep; `select` returns a boolean mask."""

    is_ragged = True

    def is_due(self, n_kept, tokens_seen, decoding, n_since):
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
