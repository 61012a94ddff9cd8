"""What hf_kvcache is measured against: one decode step of one attention layer, as each library runs it."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from transformers import DynamicCache, LlamaConfig, QuantizedCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

import hf_kvcache as kv
from hf_kvcache.attention.interface import kv_attention
from hf_kvcache.codecs.basis import Basis


def attention_module(heads: int, kv_heads: int, head_dim: int) -> LlamaAttention:
    """An attention module as caches and attention functions see one: its shapes and its RoPE; it has no weights."""
    config = LlamaConfig(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=heads * head_dim,
        num_hidden_layers=1,
        rope_parameters={"rope_theta": 500000.0, "rope_type": "default"},
    )
    with torch.device("meta"):
        return LlamaAttention(config, layer_idx=0)


class HalfRank:
    """Random bases of half the rank: keys per head, values joint or per head."""

    def __init__(self, kv_heads: int, head_dim: int, rope: str = "pre", joint: bool = True):
        self.rope = rope
        self._bases = {"k": self._basis(kv_heads, 1, head_dim), "v": self._basis(1, kv_heads, head_dim)}
        if not joint:
            self._bases["v"] = self._basis(kv_heads, 1, head_dim)

    def of(self, layer_idx: int, side: str) -> Basis:
        return self._bases[side]

    def check_model(self, module) -> None:
        pass

    @staticmethod
    @cache
    def _basis(n_groups, group_size, head_dim):
        width = group_size * head_dim
        generator = torch.Generator().manual_seed(0)
        down = torch.linalg.qr(torch.randn(n_groups, width, width, generator=generator)).Q[..., : width // 2]
        return Basis(down.contiguous(), down.mT.unflatten(2, (group_size, head_dim)).transpose(1, 2).contiguous())


def stock_step(cache, module):
    """A decode step through transformers' own cache and sdpa."""

    def step(q, k, v):
        keys, values = cache.update(k, v, 0)
        return sdpa_attention_forward(module, q, keys, values, None, scaling=module.scaling)[0]

    return step


def unfused_step(cache, module):
    """The same by matrix products and a softmax, the baseline of Palu's published speeds."""

    def step(q, k, v):
        keys, values = cache.update(k, v, 0)
        return eager_attention_forward(module, q, keys, values, None, scaling=module.scaling)[0]

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


def ours(cache, module) -> SimpleNamespace:
    """One of our caches and its decode step."""
    return SimpleNamespace(cache=cache, step=our_step(cache, module))


def stock(module) -> SimpleNamespace:
    """transformers' own cache and its decode step."""
    cache = DynamicCache()
    return SimpleNamespace(cache=cache, step=stock_step(cache, module))


def contestants(module) -> dict[str, SimpleNamespace]:
    """Name -> a fresh cache and its decode step."""
    caches = {
        "DynamicCache + sdpa": (DynamicCache(), stock_step),
        "DynamicCache, unfused": (DynamicCache(), unfused_step),
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
    sizes = module.config.num_key_value_heads, module.head_dim
    for where in ("pre", "post"):
        for joint in (True, False):
            bases = HalfRank(*sizes, where, joint)
            for bits in (None, 4):
                parts = (
                    f"LowRankCache 50 % {where}-RoPE",
                    "" if joint else ", V per head",
                    "" if bits is None else " + 4 bit",
                )
                caches["".join(parts)] = kv.LowRankCache(bases=bases, rope=where, bits=bits), our_step
    quanto = quantized_cache("quanto", 4, module.config)
    if quanto is not None:
        caches["QuantizedCache quanto 4 bit"] = (quanto, stock_step)
    return {name: SimpleNamespace(cache=cache, step=make(cache, module)) for name, (cache, make) in caches.items()}
