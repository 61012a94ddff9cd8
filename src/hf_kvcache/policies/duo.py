"""DuoAttention: some heads keep everything, the others sinks and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_kvcache.policies.ragged import Ragged
from hf_kvcache.transfers import sent_to


@dataclass
class Duo(Ragged):
    """Retrieval heads keep every token, streaming heads sinks and recent tokens (DuoAttention, arXiv 2410.10819).

    The gates, one per KV head, are learned elsewhere: this policy serves them.

    Attributes:
        gates: `[L, Hkv]` for the full-attention layers in their order, as nested lists (or a tensor).
        threshold: heads with this gate or a larger one are retrieval heads.
    """

    n_recent: int = 256
    gates: list | None = None
    threshold: float = 0.5
    place: int = field(default=0, init=False, repr=False, compare=False)

    needs = frozenset({"model"})
    takes_budget = "no"

    def __post_init__(self):
        super().__post_init__()
        if self.gates is None:
            raise ValueError("Duo: gates= says which heads keep everything, [L, Hkv]")
        self.gates = self.gates.tolist() if isinstance(self.gates, torch.Tensor) else [list(g) for g in self.gates]

    def for_model(self, context):
        place, n_places = context.depth
        n_heads = context.n_kv_heads * context.shard.count
        if len(self.gates) != n_places or any(len(own) != n_heads for own in self.gates):
            raise ValueError(f"Duo: gates must be [{n_places}, {n_heads}] for this model")
        bound = super().for_model(context)
        bound.place = place
        return bound

    def score(self, view):
        return torch.zeros(view.positions.shape, device=view.device)

    def select(self, scores, positions, tokens_seen, n_fixed, is_final=True):
        gates = sent_to(positions.device, self.shard.local_shard(torch.tensor(self.gates[self.place]), 0))
        is_wanted = (gates >= self.threshold).view(1, -1, 1).expand(positions.shape)
        return self.keep_only(is_wanted, positions, tokens_seen, n_fixed)
