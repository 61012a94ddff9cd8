"""TriAttention: keep what queries around their centre will look at, over all distances to come."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from safetensors import safe_open

from hf_kvcache.policies.base import Policy
from hf_kvcache.rope import Rope

QUERIES = 1024  # queries that are added up at a time


@dataclass
class TriAttention(Policy):
    """Score keys by the centre of the queries before RoPE (TriAttention, Mao et al. 2026, arXiv 2604.04921).

    Channels are complex pairs `f` that turn by `w_f` per position; queries of a head have the mean `c_f` and the mean
    size `a_f`. At position `t`, with offsets `d = 1, 2, 4, ... n_future`, a key `k` as it is stored is worth `mean_d
    sum_f Re(c_f conj(k_f) exp(i (t + d) w_f)) + sum_f (a_f - |c_f|) |k_f|`: the logit of the centre, a trigonometric
    series in the distance, and the most that the rest of a query adds. The mean over `d` is one factor per pair, so a
    key costs two dot products. Scores are standardised over the rows that may go, and the largest of a group counts.
    The model's factor on cosines and sines (YaRN) is in `k` once and weighs both terms once more; channels without RoPE
    are pairs that do not turn.

    The paper has `budget=2048`, `n_sink=0`, never evicts the prompt, and makes one choice for all heads of a layer or
    one for each, as ours is. It takes `c` and `a` from a pass over 32K tokens of any text, see `centres`. Their sums
    take `6 Hq D` bytes per layer and row of the batch.

    Attributes:
        n_future: the farthest offset.
        centres: safetensors file of the `centres_of` a calibration text; None for those of the text's own queries.
    """

    n_recent: int = 128
    interval: int = 128
    n_future: int = 65536
    centres: str | None = None
    rope: Rope | None = field(default=None, init=False, repr=False, compare=False)

    needs = frozenset({"model"})
    wants_queries = True

    def __post_init__(self):
        super().__post_init__()
        if self.n_future < 1:
            raise ValueError(f"TriAttention: n_future={self.n_future} must be at least 1")

    def for_model(self, context):
        bound = super().for_model(context)
        bound.rope = context.rope()
        return bound

    def on_queries(self, q, view):
        is_pad = view.positions[:, :, -q.shape[2] :] < 0  # [B, Hkv, S]
        state = view.layer_state
        n_pads = is_pad.sum(-1, keepdim=True) + state.get("n_pads", 0)  # [B, Hkv, 1]
        sums = state["sums"] if state else 0.0 if self.centres is None else self._calibrated(q, view)
        if self.rope is not None:
            self.rope.cover(view.tokens_seen, q.device)
        for i in range(0, q.shape[2] if self.centres is None else 0, QUERIES):
            part = q[:, :, i : i + QUERIES]
            first = view.tokens_seen - q.shape[2] + i
            if self.rope is not None:
                where = torch.arange(first, first + part.shape[2], device=q.device) - n_pads[:, :1]
                part = self.rope.unrotate(part, where.clamp(min=0))
            part = self._pairs(part.unflatten(1, (is_pad.shape[1], -1)))  # [B, Hkv, G, S, D / 2]
            part = part.masked_fill(is_pad[:, :, None, i : i + QUERIES, None], 0)
            sums = sums + torch.stack([part.real, part.imag, part.abs()], -1).sum(3).unsqueeze(2)
        view.set_layer_state(n_pads=n_pads, sums=sums)

    def score(self, view):  # -> [B, Hkv, N]
        # sums are as good as means: a factor on all scores of a head does not matter
        *centre, size = view.layer_state["sums"].squeeze(2).unbind(-1)
        centre = torch.complex(*centre)  # [B, Hkv, G, D / 2]
        rest = size - centre.abs()
        if self.rope is not None:
            half = len(self.rope.inv_freq)
            cos, sin = self.rope.tables(view.device).cos_sin(view.tokens_seen - 1 - view.layer_state["n_pads"])
            angles = (2.0 ** torch.arange(self.n_future.bit_length())).double().outer(self.rope.inv_freq)
            ahead = torch.exp(1j * angles).mean(0).to(view.device, centre.dtype)  # [R / 2]
            centre[..., :half] *= torch.complex(cos, sin) * ahead * self.rope.scaling
            rest[..., :half] *= self.rope.scaling
        centre, scores = torch.view_as_real(centre), []
        for k, _ in view.blocks():
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

    def _calibrated(self, q, view):
        with safe_open(self.centres, "pt", device=str(q.device)) as file:
            sums = self.shard.local_shard(file.get_tensor(str(view.layer.layer_idx)), 0)
        n_heads, n_queries = view.positions.shape[1], q.shape[1]
        if sums.shape != (n_heads, 1, n_queries // n_heads, q.shape[3] // 2, 3):
            raise ValueError(f"TriAttention: the centres in {self.centres} are of a model of other heads")
        return sums.repeat(len(q), 1, 1, 1, 1, 1)


def centres_of(cache) -> dict[str, torch.Tensor]:
    """What a cache under `TriAttention` has seen of a calibration text, by layer: `save_file` it for `centres`."""
    layers = [layer for layer in cache.layers if isinstance(getattr(layer, "policy", None), TriAttention)]
    return {str(layer.layer_idx): layer.store.layer_state.views()["sums"].sum(0) for layer in layers}
