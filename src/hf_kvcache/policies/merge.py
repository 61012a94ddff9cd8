"""Merging on eviction: what goes leaves its value to what stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from hf_kvcache.policies.base import Policy
from hf_kvcache.policies.wrapper import Wrapper

BLOCK = 2048  # rows that look for their nearest neighbour at a time


@dataclass
class Merge(Wrapper):
    """Merge the value of an evicted row into the kept row whose key is most like its own.

    The kept value becomes the mean of all values merged into it, so a row counts the more the more rows it stands for
    (as in CaM, Zhang et al. 2024, and EMS, arXiv 2412.08521, without their sampling and their global-local blend). Rows
    that are like none are dropped (EMS's zero class). Keys stay: those of different positions do not add up. Only dense
    rows can be changed, so no codec goes with it.

    Attributes:
        similarity: least cosine between keys for a row to be merged rather than dropped.
    """

    similarity: float = 0.6

    merges_evicted = True

    @classmethod
    def over(cls, scorer: Policy, **knobs) -> Merge:
        """Merging over a policy, with its budget."""
        shared = ("budget", "ratio", "n_sink", "n_recent", "decode", "interval")
        return cls(scorer=scorer, **{name: getattr(scorer, name) for name in shared}, **knobs)

    @property
    def state(self):
        return self.scorer.state | {"n_merged": torch.float32}

    def select(self, *args, **kwargs):
        return self.scorer.select(*args, **kwargs)

    def merge_evicted(self, view, kept):
        store, positions = view.layer.store, view.positions
        k, v, n_merged = store.dense["k"], store.dense["v"], store.dense["n_merged"]
        is_kept = torch.zeros_like(positions, dtype=torch.bool).scatter(-1, kept, True)
        first = torch.where(positions >= 0, positions, view.tokens_seen).amin(-1, keepdim=True)
        # sinks are looked at for their own sake
        is_target = is_kept & (positions >= first + self.n_sink)
        unit = normalize(k.float(), dim=-1)
        targets = unit.gather(2, _wide(kept, unit))
        can_take = is_target.gather(2, kept).unsqueeze(2)
        weight = 1 + n_merged  # rows that a row stands for, itself included
        total, sums = weight.clone(), v.float() * weight.unsqueeze(-1)
        for start in range(0, k.shape[2], BLOCK):
            rows = slice(start, start + BLOCK)
            likeness = (unit[:, :, rows] @ targets.mT).masked_fill(~can_take, -2)  # [B, Hkv, block, n]
            best, where = likeness.max(-1)
            goes = ~is_kept[:, :, rows] & (positions[:, :, rows] >= 0) & (best >= self.similarity)
            share, into = weight[:, :, rows] * goes, kept.gather(2, where)
            total.scatter_add_(2, into, share)
            sums.scatter_add_(2, _wide(into, sums), v[:, :, rows].float() * share.unsqueeze(-1))
        means = torch.where(is_target.unsqueeze(-1), sums / total.unsqueeze(-1), v.float())
        # not in place: a prompt's rows may still be the model's own tensor
        store.dense.tensors["v"] = means.to(v.dtype)
        n_merged.copy_(torch.where(is_target, total - 1, n_merged))


def _wide(index, like):
    return index.unsqueeze(-1).expand(*index.shape, like.shape[-1])
