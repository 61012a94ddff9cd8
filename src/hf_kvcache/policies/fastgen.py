"""FastGen: every head gets the cheapest way of forgetting that suits it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_kvcache.policies.ragged import Ragged
from hf_kvcache.policies.weights import newest_mass


@dataclass
class FastGen(Ragged):
    """Profile each head once, at the end of the prompt, and let it forget accordingly (FastGen, arXiv 2310.01801).

    A head gets the first of these that recovers `recovery` of its attention: sinks and recent tokens; the newest
    `local` of its tokens beside them; its `heavy` most attended tokens beside those; everything. The paper's classes of
    special tokens and punctuation are not offered: a cache does not see which token a row is.

    Attributes:
        recovery: share of the attention of the last `n_queries` queries that must be recovered.
        local, heavy: shares of the tokens seen.
        n_queries: newest queries that are looked at, of the prompt and later.
    """

    recovery: float = 0.95
    local: float = 0.3
    heavy: float = 0.3
    n_queries: int = 32

    takes_budget = "no"

    def __post_init__(self):
        super().__post_init__()
        for name in ("recovery", "local", "heavy"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"FastGen: {name}={getattr(self, name)} is not in (0, 1]")

    def score(self, view):
        """One for rows that the profile of their head keeps, else zero: `[B, Hkv, N]`."""
        mass = newest_mass(view, self.n_queries)
        sets = self._sets(mass, view.positions, view.tokens_seen)  # [4, B, Hkv, N]
        if "profile" not in view.layer_state:
            recovered = (mass * sets).sum(-1) >= self.recovery * mass.sum(-1)
            view.set_layer_state(profile=recovered.byte().argmax(0).unsqueeze(-1))
        profile = view.layer_state["profile"].expand(mass.shape)  # [B, Hkv, N]
        return sets.gather(0, profile.unsqueeze(0))[0].float()

    def select(self, scores, positions, tokens_seen, n_fixed, is_final=True):
        return self.keep_only(scores > 0, positions, tokens_seen, n_fixed)

    def _sets(self, mass, positions, tokens_seen):
        """What each way of forgetting keeps, the cheapest first, boolean `[4, B, Hkv, N]`."""
        ends = self.is_protected(positions, tokens_seen)
        local = ends | (positions >= tokens_seen - int(self.local * tokens_seen))
        n_heavy = min(max(int(self.heavy * tokens_seen), 1), positions.shape[-1])
        best = mass.masked_fill(positions < 0, -1).topk(n_heavy, -1).indices
        heavy = torch.zeros_like(local).scatter(-1, best, True)
        return torch.stack([ends, local, local | heavy, torch.ones_like(local)])
