"""What a policy must offer: which tokens stay."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch


@dataclass
class Policy:
    """Keep the best-scored tokens of every head within a budget. A subclass is its `score`.

    Attributes:
        budget: tokens to keep per head, as a count.
        ratio: or as a share of the tokens seen, `0 < ratio <= 1`.
        n_sink: oldest tokens that always stay (StreamingLLM, Xiao et al. 2023: they take the softmax's surplus).
        n_recent: newest tokens that always stay.
        decode: whether to evict while decoding too, or only after the prompt.
        interval: tokens by which a decoding layer may overshoot its budget before it evicts, so that eviction
            moves the kept rows once per `interval` tokens.

    Class attributes:
        needs: what `score` reads beyond the rows: "queries", "projections".
        state: per-row tensors that follow the rows through eviction and beams, name -> dtype.
    """

    budget: int | None = None
    ratio: float | None = None
    n_sink: int = 4
    n_recent: int = 32
    decode: bool = True
    interval: int = 32

    needs: ClassVar[frozenset[str]] = frozenset()
    state: ClassVar[dict[str, torch.dtype]] = {}

    def __post_init__(self):
        name = type(self).__name__
        if (self.budget is None) == (self.ratio is None):
            raise ValueError(f"{name}: give either budget= (tokens) or ratio= (share of the tokens seen)")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"{name}: ratio={self.ratio} is not in (0, 1]")
        if self.budget is not None and self.budget < self.n_sink + self.n_recent:
            raise ValueError(
                f"{name}: budget={self.budget} leaves nothing to choose; it must be at least "
                f"n_sink + n_recent = {self.n_sink} + {self.n_recent}"
            )
        if min(self.n_sink, self.n_recent) < 0 or self.interval < 1:
            raise ValueError(f"{name}: n_sink and n_recent must not be negative, interval must be at least 1")

    def tokens_to_keep(self, tokens_seen: int) -> int:
        """The budget in tokens after `tokens_seen` tokens."""
        if self.budget is not None:
            return self.budget
        return max(int(self.ratio * tokens_seen), self.n_sink + self.n_recent)

    def is_due(self, n_kept: int, tokens_seen: int, decoding: bool) -> bool:
        """Whether this step has to evict."""
        if decoding and not self.decode:
            return False
        return n_kept >= self.tokens_to_keep(tokens_seen) + (self.interval if decoding else 1)

    def score(self, q: torch.Tensor | None, view) -> torch.Tensor:
        """Worth of every kept row, `[B, Hkv, N]` in view order; higher stays.

        Args:
            q: queries of this call after RoPE, `[B, Hq, S, D]`.
            view: the `KVView` of the layer.
        """
        raise NotImplementedError

    def select(self, scores: torch.Tensor, positions: torch.Tensor, tokens_seen: int, n_fixed: int) -> torch.Tensor:
        """Rows that stay, ascending in view order, `[B, Hkv, n]`.

        Args:
            scores: from `score`, `[B, Hkv, N]`.
            positions: logical positions, -1 for padding, `[B, Hkv, N]`.
            tokens_seen: tokens the layer has seen.
            n_fixed: rows at the end of the view that cannot go (the dense window over packed rows).
        """
        is_real = positions >= 0
        first = torch.where(is_real, positions, tokens_seen).amin(-1, keepdim=True)
        is_protected = is_real & ((positions < first + self.n_sink) | (positions >= tokens_seen - self.n_recent))
        worth = scores.float().nan_to_num(0.0).masked_fill(~is_real, float("-inf"))
        worth = worth.masked_fill(is_protected, float("inf"))
        n_free = worth.shape[-1] - n_fixed
        n_keep = max(self.tokens_to_keep(tokens_seen) - n_fixed, 0)
        kept = worth[..., :n_free].topk(min(n_keep, n_free), dim=-1, sorted=False).indices.sort(-1).values
        fixed = torch.arange(n_free, worth.shape[-1], device=kept.device).expand(*kept.shape[:2], n_fixed)
        return torch.cat([kept, fixed], -1)

    def spec(self) -> dict:
        """JSON-able description, read back by `policy_from_spec`."""
        return {"policy": type(self).__name__} | {f.name: getattr(self, f.name) for f in fields(self)}


def policy_from_spec(spec: dict | None) -> Policy | None:
    """The policy that `spec()` described."""
    if spec is None:
        return None
    kinds = {kind.__name__: kind for kind in Policy.__subclasses__()}
    if spec.get("policy") not in kinds:
        raise ValueError(f"no policy is called {spec.get('policy')!r}")
    return kinds[spec["policy"]](**{k: v for k, v in spec.items() if k != "policy"})
