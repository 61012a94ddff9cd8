"""TriAttention: keep what queries around their centre will look at, over all distances to come."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_kvcache.policies.query_centres import read_centres
from hf_kvcache.policies.query_statistics import QueryStatistics
from hf_kvcache.transfers import sent_to


@dataclass
class TriAttention(QueryStatistics):
    """Score keys by the centre of the queries before RoPE (TriAttention, arXiv 2604.04921).

    Channels are complex pairs `f` that turn by `w_f` per position; queries of a head have the mean `c_f` and the mean
    size `a_f`. At position `t`, with offsets `d = 1, 2, 4, ... n_future`, a key `k` as it is stored is worth `mean_d
    sum_f Re(c_f conj(k_f) exp(i (t + d) w_f)) + sum_f (a_f - |c_f|) |k_f|`: the logit of the centre, a trigonometric
    series in the distance, and the most that the rest of a query adds. The mean over `d` is one factor per pair, so a
    key costs two dot products. Scores are standardised over the rows that may go, and the largest of a group counts.
    YaRN's factor on cosines and sines is in `k` once and weighs both terms again; channels without RoPE do not turn.

    The paper has `budget=2048`, `n_sink=0`, never evicts the prompt, and takes `c` and `a` from a pass over 32K tokens
    of any text, see `centres`. Their sums take `6 Hq D` bytes per layer and row of the batch.

    Attributes:
        n_future: the farthest offset.
        centres: safetensors file of the `centres_of` a calibration text; None for those of the text's own queries.
    """

    n_recent: int = 128
    interval: int = 128
    n_future: int = 65536
    centres: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.n_future < 1:
            raise ValueError(f"TriAttention: n_future={self.n_future} must be at least 1")

    def started(self, q, view):
        return {} if self.centres is None else read_centres(self.centres, q, view, self.shard)

    def added(self, state, q, where):
        if self.centres is not None:
            return state
        pairs = self._pairs(q).masked_fill((where < 0).unsqueeze(2).unsqueeze(-1), 0)  # [B, Hkv, G, S, D / 2]
        sums = torch.stack([pairs.real, pairs.imag, pairs.abs()], -1).sum(3).unsqueeze(2)
        return {"sums": sums + state.get("sums", 0.0)}

    def score(self, view):  # -> [B, Hkv, N]
        # sums are as good as means: a factor on all scores of a head does not matter
        *centre, size = view.layer_state["sums"].squeeze(2).unbind(-1)
        centre = torch.complex(*centre)  # [B, Hkv, G, D / 2]
        rest = size - centre.abs()
        if self.rope is not None:
            half = len(self.rope.inv_freq)
            cos, sin = self.rope.tables(view.device).cos_sin(view.tokens_seen - 1 - view.layer_state["n_pads"])
            angles = (2.0 ** torch.arange(self.n_future.bit_length())).double().outer(self.rope.inv_freq)
            ahead = sent_to(view.device, torch.exp(1j * angles).mean(0).to(centre.dtype))  # [R / 2]
            centre[..., :half] *= torch.complex(cos, sin) * ahead * self.rope.scaling
            rest[..., :half] *= self.rope.scaling
        centre, scores = torch.view_as_real(centre), []
        for k in view.key_blocks():
            k = self._pairs(k)  # [B, Hkv, n, D / 2]
            series = torch.einsum("bhgfc,bhnfc->bhgn", centre, torch.view_as_real(k))
            scores.append(series + torch.einsum("bhgf,bhnf->bhgn", rest, k.abs()))
        is_out = (view.positions < 0) | self.is_protected(view.positions, view.tokens_seen)
        is_out = is_out.unsqueeze(2)  # [B, Hkv, 1, N]
        scores, n = torch.cat(scores, -1).masked_fill(is_out, 0.0), (~is_out).sum(-1, keepdim=True).clamp(min=1)
        scores = (scores - scores.sum(-1, keepdim=True) / n).masked_fill(is_out, 0.0)
        return (scores / (scores.square().sum(-1, keepdim=True) / n).sqrt().clamp(min=1e-6)).amax(2)

    def _pairs(self, x):
        """Channels `[..., D]` as complex numbers `[..., D / 2]`: the pairs that RoPE turns, then the others."""
        half = 0 if self.rope is None else len(self.rope.inv_freq)
        rest = x.shape[-1] // 2 - half
        a, b, c, d = x.float().split([half, half, rest, rest], -1)
        return torch.complex(torch.cat([a, c], -1), torch.cat([b, d], -1))
