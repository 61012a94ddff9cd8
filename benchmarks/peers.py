"""What hf_kvcache is measured against: one decode step of one attention layer, as each library runs it."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from transformers import DynamicCache, QuantizedCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hf_kvcache as kv
from hf_kvcache.attention.interface import kv_attention


class Layer(torch.nn.Module):
    """Stands for an attention module: what attention functions read of one."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.num_key_value_groups, self.layer_idx, self.is_causal = heads // kv_heads, 0, True
        self.head_dim, self.scaling = head_dim, head_dim**-0.5
        self.config = kv_config(heads, kv_heads, head_dim)


def kv_config(heads, kv_heads, head_dim):
    from transformers import LlamaConfig

    return LlamaConfig(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=heads * head_dim,
        num_hidden_layers=1,
    )


def stock_step(cache, module):
    """A decode step through transformers' own cache and sdpa."""

    def step(q, k, v):
        keys, values = cache.update(k, v, 0)
        return sdpa_attention_forward(module, q, keys, values, None, scaling=module.scaling)[0]

    return step


def our_step(cache, module):
    """A decode step through one of our caches: append, attend, settle."""

    def step(q, k, v):
        keys, values = cache.update(k, v, 0)
        return kv_attention(module, q, keys, values, None, scaling=module.scaling)[0]

    return step


def quantized_cache(backend: str, bits: int, config):
    """transformers' QuantizedCache, or None when the backend is not installed."""
    try:
        return QuantizedCache(backend, config, nbits=bits)
    except ImportError:
        return None


def contestants(module) -> dict[str, SimpleNamespace]:
    """Name -> a fresh cache and its decode step."""
    caches = {
        "DynamicCache + sdpa": (DynamicCache(), stock_step),
        "KVCache": (kv.KVCache(), our_step),
        "QuantCache 8 bit": (kv.QuantCache(8), our_step),
        "QuantCache 4 bit": (kv.QuantCache(4), our_step),
        "QuantCache 2 bit": (kv.QuantCache(2), our_step),
        "SparseCache 50 %": (kv.SparseCache(0.5), our_step),
        "SparseCache 50 % 2:4": (kv.SparseCache(0.5, group_size=4), our_step),
        "SparseCache 50 % index": (kv.SparseCache(0.5, layout="index"), our_step),
        "SparseCache 70 %": (kv.SparseCache(0.7), our_step),
        "SparseCache 70 % index": (kv.SparseCache(0.7, layout="index"), our_step),
        "SparseCache 70 % + 8 bit": (kv.SparseCache(0.7, bits=8), our_step),
        "SparseCache 70 % + 4 bit": (kv.SparseCache(0.7, bits=4), our_step),
    }
    quanto = quantized_cache("quanto", 4, module.config)
    if quanto is not None:
        caches["QuantizedCache quanto 4 bit"] = (quanto, stock_step)
    return {name: SimpleNamespace(cache=cache, step=make(cache, module)) for name, (cache, make) in caches.items()}
