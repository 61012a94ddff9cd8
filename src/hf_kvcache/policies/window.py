"""What policies share that go by the newest queries and keep those tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import avg_pool1d, max_pool1d

from hf_kvcache.policies.base import Policy
from hf_kvcache.policies.weights import newest_mass


@dataclass
class WindowPolicy(Policy):
    """A policy that asks the newest tokens, which stay: `n_recent` is at least `n_queries`.

    Attributes:
        n_queries: newest queries that are asked.
    """

    n_queries: int = 32

    def __post_init__(self):
        if self.n_queries < 1:
            raise ValueError(f"{type(self).__name__}: n_queries={self.n_queries} must be at least 1")
        self.n_recent = max(self.n_recent, self.n_queries)
        super().__post_init__()

    def votes(self, view) -> torch.Tensor:
        """Attention of the window's queries to the rows before it, summed over them; float32 `[B, Hkv, N]`.

        Weights are meaned over the heads of a group. The window itself and padding get nothing.
        """
        is_window = view.positions >= view.tokens_seen - self.n_queries
        return newest_mass(view, self.n_queries).masked_fill(is_window, 0.0)


def check_kernel(policy: Policy, kernel: int) -> None:
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"{type(policy).__name__}: kernel={kernel} must be odd, so that it has a middle")


def pool(scores: torch.Tensor, positions: torch.Tensor, kernel: int, how: str = "max") -> torch.Tensor:
    """Pool `scores` >= 0 `[B, Hkv, N]` over the `kernel` kept rows around each, in the order of their positions.

    Padding, whose scores are 0, stands before the first token and is to its neighbours what the edge is.
    """
    pools = {"max": max_pool1d, "avg": avg_pool1d}
    # packed rows stand before the sinks in view order
    order = positions.argsort(dim=-1, stable=True)
    pooled = pools[how](scores.gather(-1, order), kernel, stride=1, padding=kernel // 2)
    return torch.empty_like(pooled).scatter_(-1, order, pooled)
