"""What tells one model from another, as saved caches and adapters say whose they are."""

from __future__ import annotations

import torch

from hf_kvcache.adapters.base_weights import weights_digest
from hf_kvcache.sharded_model import shard_of_heads
from hf_kvcache.shards import WHOLE


def fingerprint(module: torch.nn.Module) -> dict:
    """What tells one model from another, read off one attention layer: shapes, and a sample of the weights.

    Weights are sampled in bfloat16, so that the same model loaded in another dtype has the same fingerprint.
    """
    config = module.config
    return {
        "attention": type(module).__name__,
        "num_hidden_layers": getattr(config, "num_hidden_layers", None),
        "hidden_size": getattr(config, "hidden_size", None),
        "weights": weights_digest(module),
    }


def whose(layer, module: torch.nn.Module) -> dict:
    """Which of the model's heads a layer has rows of, where several processes share them; empty elsewhere."""
    shard = shard_of_heads(module, layer.n_kv_heads) if layer.is_initialized else WHOLE
    return {} if shard.count == 1 else {"shard": f"{shard.rank} of {shard.count}"}
