"""A whole model: prefill and decode, on the embedded model (CPU) or an 8B-shaped one with random weights (GPU)."""

from __future__ import annotations

import functools

import peers
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import hf_kvcache as kv
from hf_kvcache.bench.timing import interleaved, timed
from hf_kvcache.compat import cache_argument

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
}
BASELINE = "DynamicCache"


def caches(config) -> dict:
    """Name -> constructor."""
    found = {
        BASELINE: lambda: DynamicCache(config=config),
        "KVCache": kv.KVCache,
        "QuantCache 8 bit": lambda: kv.QuantCache(8),
        "QuantCache 4 bit": lambda: kv.QuantCache(4),
        "QuantCache 2 bit": lambda: kv.QuantCache(2),
        "SparseCache 50 %": lambda: kv.SparseCache(0.5),
        "SparseCache 70 %": lambda: kv.SparseCache(0.7),
        "SparseCache 70 % + 4 bit": lambda: kv.SparseCache(0.7, bits=4),
        "LowRankCache 50 %": lambda: kv.LowRankCache(0.5),
        "LowRankCache 50 % + 4 bit": lambda: kv.LowRankCache(0.5, bits=4),
        "LowRankCache 50 % post-RoPE": lambda: kv.LowRankCache(0.5, rope="post"),
        "EvictionCache keydiff 25 %": lambda: kv.EvictionCache("keydiff", ratio=0.25),
    }
    for backend in ("quanto", "hqq"):
        if peers.quantized_cache(backend, 4, config) is not None:
            found[f"QuantizedCache {backend} 4 bit"] = functools.partial(peers.quantized_cache, backend, 4, config)
    return found


@torch.no_grad()
def prefill(options) -> list[dict]:
    """Time to the first token, and what compressing adds to it."""
    model, dtype = _model(options)
    rows = []
    for n_tokens in (2048, 8192) if options.device == "cpu" else (32768,):
        ids = _ids(model, 1, n_tokens)
        calls = {name: functools.partial(_prefill, model, ids, make) for name, make in caches(model.config).items()}
        times = interleaved(calls, min(options.rounds, 7), options.device)
        base = times[BASELINE]["ms"]
        rows += [
            {"cache": name, "tokens": n_tokens, "dtype": dtype, "ms": t["ms"], "x DynamicCache": t["ms"] / base}
            for name, t in times.items()
        ]
    return rows


@torch.no_grad()
def decode(options) -> list[dict]:
    """Tokens per second after a prompt of 8,192 tokens (32,768 on a GPU)."""
    model, dtype = _model(options)
    grid = [(1, 8192)] if options.device == "cpu" else [(1, 32768), (8, 32768)]
    rows = []
    for batch, n_tokens in grid:
        ids = _ids(model, batch, n_tokens)
        contestants, reference = {}, None
        for name, make in caches(model.config).items():
            cache = make()
            logits = model(ids, **cache_argument(cache), logits_to_keep=1).logits
            reference = logits if reference is None else reference
            if not torch.allclose(logits.float(), reference.float(), atol=0.05, rtol=0.05):
                raise AssertionError(f"{name}: prefill logits differ from DynamicCache; nothing was timed")
            token = ids[:, -1:]
            contestants[name] = functools.partial(model, token, **cache_argument(cache))
        times = interleaved(contestants, options.rounds * 4, options.device)
        base = times[BASELINE]["ms"]
        rows += [
            {
                "cache": name,
                "batch": batch,
                "tokens": n_tokens,
                "dtype": dtype,
                "ms per token": times[name]["ms"],
                "tokens/s": batch * 1e3 / times[name]["ms"],
                "x DynamicCache": base / times[name]["ms"],
            }
            for name in contestants
        ]
    return rows


MARGIN = 128  # tokens that the caches of `equal_memory` have room for after the prompt


@torch.no_grad()
def equal_memory(options) -> list[dict]:
    """Tokens per second when every cache may hold the same bytes, and so decodes as many sequences as fit.

    The bytes are those of `DynamicCache` after the last timed token; ours make room for all tokens at once.
    """
    model, dtype = _model(options)
    n_dense, n_tokens = (2, 8192) if options.device == "cpu" else (4, 32768)
    room = {"max_length": n_tokens + MARGIN}
    makers = {
        BASELINE: lambda: DynamicCache(config=model.config),
        "KVCache": lambda: kv.KVCache(**room),
        "QuantCache 4 bit": lambda: kv.QuantCache(4, **room),
        "SparseCache 50 %": lambda: kv.SparseCache(0.5, **room),
        "SparseCache 70 %": lambda: kv.SparseCache(0.7, **room),
        "SparseCache 70 % + 4 bit": lambda: kv.SparseCache(0.7, bits=4, **room),
        "LowRankCache 50 %": lambda: kv.LowRankCache(0.5, **room),
        "LowRankCache 50 % + 4 bit": lambda: kv.LowRankCache(0.5, bits=4, **room),
        "LowRankCache 50 % post-RoPE + 4 bit": lambda: kv.LowRankCache(0.5, bits=4, rope="post", **room),
    }
    exact, reference = kv.KVCache(**room), None
    _prompted(model, exact, 1, n_tokens)
    budget = n_dense * exact.nbytes
    contestants, rows, filled = {}, {}, {}
    for name, make in makers.items():
        one = make()
        logits = _prompted(model, one, 1, n_tokens)
        reference = logits if reference is None else reference
        if not torch.allclose(logits.float(), reference.float(), atol=0.05, rtol=0.05):
            raise AssertionError(f"{name}: prefill logits differ from DynamicCache; nothing was timed")
        batch = n_dense if name == BASELINE else max(budget // one.nbytes, 1)
        cache = filled[name] = make()
        _prompted(model, cache, batch, n_tokens)
        contestants[name] = functools.partial(model, _ids(model, batch, 1), **cache_argument(cache))
        rows[name] = {"cache": name, "tokens": n_tokens, "budget MiB": budget / 2**20, "batch": batch, "dtype": dtype}
    times = interleaved(contestants, min(options.rounds, MARGIN // 2), options.device)
    base = rows[BASELINE]["batch"] / times[BASELINE]["ms"]
    for name, row in rows.items():
        held = getattr(filled[name], "nbytes", None)
        if held is not None and held > budget:
            raise AssertionError(f"{name}: holds {held} bytes, over the budget of {budget}")
        row |= {"ms per step": times[name]["ms"], "tokens/s": 1e3 * row["batch"] / times[name]["ms"]}
        row["x DynamicCache"] = row["batch"] / times[name]["ms"] / base
    return list(rows.values())


def _prompted(model, cache, batch, n_tokens):
    """Logits after a prompt of random tokens, which `cache` holds from then on."""
    return model(_ids(model, batch, n_tokens), **cache_argument(cache), logits_to_keep=1).logits


def _prefill(model, ids, make):
    return model(ids, **cache_argument(make()), logits_to_keep=1)


@functools.cache
def _cached_model(device: str):
    if device == "cpu":
        model = AutoModelForCausalLM.from_pretrained(kv.embedded_model(), dtype=torch.bfloat16)
    else:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_8B), dtype=torch.bfloat16)
    model.set_attn_implementation("hf_kvcache")
    # a first call builds native code and tunes libraries, which is nobody's decode time
    timed(lambda: model(_ids(model, 1, 256), **cache_argument(kv.QuantCache(4))), device)
    return model.eval()


def _model(options):
    return _cached_model(options.device), "bfloat16"


def _ids(model, batch, n_tokens):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(8, 3000, (batch, n_tokens), generator=generator).to(model.device)
