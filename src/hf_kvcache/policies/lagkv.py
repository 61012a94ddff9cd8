"""LagKV: keep the tokens that stand out against those that come after them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_kvcache.policies.base import Policy


@dataclass
class LagKV(Policy):
    """Keep tokens whose channels spread most in the range of the next partition (LagKV, arXiv 2504.04704).

    Rows behind the sinks are cut into partitions of `lag`. A row of one partition is normalised channel by channel
    with the smallest and largest value of the next one; the standard deviation over the channels goes through a
    softmax over the partition, for keys and for values, and the two are averaged. The score is the row's rank inside
    its partition, so that every partition keeps the same share; equal ranks go to the newer partition. The last full
    partition and what follows have nothing to be compared with: they are worth more than all others, newest first.

    Needs no queries. The paper compresses a partition once; here later evictions cut what was kept into partitions
    anew. Channels in which the next partition has one value only are not scaled.

    Attributes:
        lag: rows of a partition.
    """

    lag: int = 128

    def __post_init__(self):
        super().__post_init__()
        if self.lag < 2:
            raise ValueError(f"LagKV: lag={self.lag} must be at least 2")

    def score(self, view):  # -> [B, Hkv, N]
        positions = view.positions
        is_real = positions >= 0
        # the order of positions, padding last: partitions start at a row's own first token
        order = torch.where(is_real, positions, view.tokens_seen).argsort(dim=-1, stable=True)
        rank = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        n_real = is_real.sum(-1, keepdim=True)  # [B, Hkv, 1]
        # what cannot be compared: sinks, the last full partition, the rest
        scores = 1 + rank / n_real.clamp(min=1)
        n_parts = (order.shape[-1] - self.n_sink) // self.lag
        if n_parts > 1:
            rows = slice(self.n_sink, self.n_sink + n_parts * self.lag)
            index = order[..., rows]
            spread = sum(self._spread(torch.cat(side, 2), index) for side in zip(*view.blocks())) / 2
            place = spread.argsort(-1).argsort(-1)  # [B, Hkv, parts - 1, lag]
            part = torch.arange(n_parts - 1, device=order.device).unsqueeze(-1)
            # the number of partitions is the row's own: other rows of the batch may be padded less
            n_own = ((n_real - self.n_sink) // self.lag).unsqueeze(-1)  # [B, Hkv, 1, 1]
            ranked = (place + part / n_own.clamp(min=1)) / self.lag
            compared = slice(self.n_sink, self.n_sink + (n_parts - 1) * self.lag)
            old = scores[..., compared].unflatten(-1, (-1, self.lag))
            scores[..., compared] = torch.where(part < n_own - 1, ranked, old).flatten(2)
        return torch.empty_like(scores).scatter_(-1, order, scores)

    def _spread(self, x, index):
        """Softmax of the channels' standard deviation, lag-normalised; `[B, Hkv, parts - 1, lag]`."""
        x = x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])).float()
        x = x.unflatten(2, (-1, self.lag))  # [B, Hkv, parts, lag, D]
        low, high = x[:, :, 1:].aminmax(dim=3, keepdim=True)
        span = high - low
        return ((x[:, :, :-1] - low) / span.masked_fill(span == 0, 1.0)).std(-1).softmax(-1)
