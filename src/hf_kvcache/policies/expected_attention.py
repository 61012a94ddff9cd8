"""Expected attention: keep what the next queries will attend to, if they are like the past ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_kvcache.policies.query_statistics import QueryStatistics
from hf_kvcache.rope import rotate


@dataclass
class ExpectedAttention(QueryStatistics):
    """Keep what the next queries are expected to attend to (Expected Attention, arXiv 2510.00636).

    Queries are taken to be Gaussian: those of a head before RoPE have mean `mu` and covariance `Sigma`. Turned by the
    mean rotation of the next `n_future` positions, they give a key the expected weight
    `exp(k.mu / sqrt(D) + k^T Sigma k / 2 D)`. Weights are normalised over the keys (a softmax), averaged over the query
    heads of a group, and the score is `(weight + epsilon) * ||v||`.

    Moments are those of all queries so far but the sinks', taken from the queries themselves; the published code takes
    them from the hidden states of the prompt, which excludes models that normalise queries. The model's own scaling
    stands for `1 / sqrt(D)`; a softcap is not accounted for. Moments take `4 Hq (D^2 + D)` bytes per layer and row of
    the batch, as much as some hundred tokens, and are updated at every step.

    Attributes:
        n_future: positions over which the rotation is averaged.
        epsilon: added to weights, so that values have a say where keys have none.
    """

    n_future: int = 512
    epsilon: float = 1e-2

    def __post_init__(self):
        super().__post_init__()
        if self.n_future < 1 or self.epsilon < 0:
            raise ValueError("ExpectedAttention: n_future must be at least 1 and epsilon must not be negative")

    def added(self, state, q, where):
        names, found = ("n", "mean", "spread"), moments_of(q, where >= self.n_sink)
        return dict(zip(names, merged(tuple(state[name] for name in names), found) if state else found))

    def score(self, view):  # -> [B, Hkv, N]
        state, is_real = view.layer_state, view.positions >= 0
        mean, spread = state["mean"].squeeze(2), state["spread"].squeeze(2)  # [B, Hkv, G, D], [B, Hkv, G, D, D]
        cov = spread / state["n"].clamp(min=1).unsqueeze(-1).unsqueeze(-1)
        if self.rope is not None:
            self.rope.cover(view.tokens_seen + self.n_future, view.device)
            next_ones = view.tokens_seen - state["n_pads"] + torch.arange(self.n_future, device=view.device)
            cos, sin = self.rope.tables(view.device).cos_sin(next_ones)  # [B, Hkv, n_future, R / 2]
            cos, sin = (x.mean(2).unsqueeze(2) * self.rope.scaling for x in (cos, sin))
            mean = rotate(mean, cos, sin)
            # R Sigma R^T: rotate every column, then every row
            cos, sin = cos.unsqueeze(3), sin.unsqueeze(3)
            cov = rotate(rotate(cov, cos, sin).mT, cos, sin)
        logits, norms = [], []
        for k, v in view.blocks():
            k = k.float() * view.scaling
            first = torch.einsum("bhgd,bhnd->bhgn", mean, k)
            logits.append(first + torch.einsum("bhnd,bhgde,bhne->bhgn", k, cov, k) / 2)
            norms.append(v.float().norm(dim=-1))
        is_candidate = is_real & (view.positions - state["n_pads"] >= self.n_sink)
        logits = torch.cat(logits, -1).masked_fill(~is_candidate.unsqueeze(2), float("-inf"))
        weights = logits.softmax(-1).mean(2).nan_to_num(0.0)
        return (weights + self.epsilon) * torch.cat(norms, -1)


def moments_of(x, counts):
    """Number, mean and sum of squares about it of the rows of `x` `[B, Hkv, G, S, D]` that count, `[B, Hkv, S]`."""
    is_out = ~counts.unsqueeze(2).unsqueeze(-1)
    n = counts.sum(-1, keepdim=True).float()  # [B, Hkv, 1]
    mean = x.masked_fill(is_out, 0.0).sum(3) / n.clamp(min=1).unsqueeze(-1)  # [B, Hkv, G, D]
    x = (x - mean.unsqueeze(3)).masked_fill(is_out, 0.0)
    return n, mean.unsqueeze(2), (x.mT @ x).unsqueeze(2)


def merged(one, other):
    """Moments of two sets together (Chan et al. 1979), which loses nothing where the mean is large."""
    (n_a, mean_a, spread_a), (n_b, mean_b, spread_b) = one, other
    n, shift = n_a + n_b, mean_b - mean_a
    share = (n_b / n.clamp(min=1)).unsqueeze(-1).unsqueeze(-1)  # [B, Hkv, 1, 1, 1]
    between = shift.unsqueeze(-1) * shift.unsqueeze(-2) * (n_a.unsqueeze(-1).unsqueeze(-1) * share).unsqueeze(-1)
    return n, mean_a + shift * share, spread_a + spread_b + between
