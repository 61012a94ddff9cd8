"""Random: the baseline that every other policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_kvcache.policies.base import Policy
from hf_kvcache.shards import Shard
from hf_kvcache.transfers import sent_to


@dataclass
class Random(Policy):
    """Keep tokens at random, head by head; sinks and recent tokens stay.

    A token draws its score once, uniformly, and keeps it (4 bytes per row and head): what is kept is at any time a
    fair sample of all tokens seen, however often rows were evicted. Draws depend on `seed`, layer, head and tokens
    seen, and are the same for all rows of a batch and on any device.

    Attributes:
        seed: of the draws.
    """

    seed: int = 0

    needs = frozenset({"model"})
    state = {"luck": torch.float32}

    def score(self, view):  # -> [B, Hkv, N]
        luck = view.state("luck")
        fresh = uniform((self.seed, view.layer.layer_idx, view.tokens_seen), luck, self.shard)
        # new rows have drawn nothing yet: zero is never drawn
        view.set_state("luck", torch.where(luck == 0, fresh, luck))
        return view.state("luck")


def uniform(seeds: tuple[int, ...], like: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Numbers between 0 and 1, both excluded, for the heads and rows of `like` `[B, Hkv, N]`, as `[Hkv, N]`."""
    # a polynomial in a large prime keeps apart what differs in one place only
    seed = sum(x * 1_000_003**i for i, x in enumerate(seeds)) % 2**63
    # drawn on the CPU: other devices draw other numbers from the same seed
    shape = like.shape[1] * shard.count, like.shape[2]
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return sent_to(like.device, shard.local_shard(drawn, 0).clamp(1e-6, 1 - 1e-6).float())
