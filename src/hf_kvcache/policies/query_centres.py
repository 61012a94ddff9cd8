"""Centres of queries that were taken from a calibration text once, instead of from the text that is read."""

from __future__ import annotations

import torch
from safetensors import safe_open

from hf_kvcache.policies.query_statistics import QueryStatistics
from hf_kvcache.shards import Shard


def centres_of(cache) -> dict[str, torch.Tensor]:
    """What a cache under `TriAttention` has seen of a calibration text, by layer: `save_file` it for `centres`."""
    layers = [layer for layer in cache.layers if isinstance(getattr(layer, "policy", None), QueryStatistics)]
    return {str(layer.layer_idx): layer.store.layer_state.views()["sums"].sum(0) for layer in layers}


def read_centres(path: str, q: torch.Tensor, view, shard: Shard) -> dict[str, torch.Tensor]:
    """The layer state of `TriAttention` as `centres_of` has written it, for queries `[B, Hq, S, D]` of one layer.

    Raises:
        ValueError: it is of other heads.
    """
    with safe_open(path, "pt", device=str(q.device)) as file:
        sums = shard.local_shard(file.get_tensor(str(view.layer.layer_idx)), 0)
    n_heads = view.new_k.shape[1]
    if sums.shape != (n_heads, 1, q.shape[1] // n_heads, q.shape[3] // 2, 3):
        raise ValueError(f"TriAttention: the centres in {path} are of a model of other heads")
    return {"sums": sums.repeat(len(q), 1, 1, 1, 1, 1)}
