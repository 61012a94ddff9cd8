"""One attention layer, one decode step: append, attend, compress."""

from __future__ import annotations

import peers
import torch

from hf_kvcache.attention.call import AttentionCall
from hf_kvcache.bench.timing import interleaved

BASELINE, UNFUSED = "DynamicCache + sdpa", "DynamicCache, unfused"
# relative error against float64 attention on the rows that a contestant holds; for a peer, whose rows we cannot read
# back, on the exact ones
TOLERANCE = {"Quantized": 0.2, "": 0.02}
SHAPES = {
    "Llama-3.1-8B": {"heads": 32, "kv_heads": 8, "head_dim": 128},
    "Llama-2-7B": {"heads": 32, "kv_heads": 32, "head_dim": 128},
}


def decode_step(options) -> list[dict]:
    """A decode step at the shapes of Llama-3.1-8B and Llama-2-7B, bf16, cold data: rotates over several layers."""
    if options.device == "cpu":
        grid = [("Llama-3.1-8B", 1, 16384, 4), ("Llama-2-7B", 1, 8192, 2)]
    else:
        # a large layer does not fit the caches of the chip anyway, and two dozen copies of it must fit its memory
        grid = [("Llama-3.1-8B", b, n, 4 if b * n <= 2**19 else 1) for n in (32768, 131072) for b in (1, 4, 16)]
        grid += [("Llama-2-7B", 1, n, 2) for n in (16384, 65536, 131072)]
    return [row for shape, batch, n, layers in grid for row in _decode_step(options, shape, batch, n, layers)]


def scaling(options) -> list[dict]:
    """The same step at growing lengths: linear in what is kept, and append and settle flat."""
    lengths = (2048, 4096, 8192, 16384, 32768)
    names = (BASELINE, "KVCache", "QuantCache 4 bit", "SparseCache 50 %", "SparseCache 70 %")
    return [row for n in lengths for row in _decode_step(options, "Llama-3.1-8B", 1, n, 2, names)]


def _decode_step(options, shape, batch, n_tokens, n_layers, names=None) -> list[dict]:
    sizes = SHAPES[shape]
    module = peers.attention_module(**sizes)
    q_shape = (batch, sizes["heads"], 1, sizes["head_dim"])
    kv_shape = (batch, sizes["kv_heads"], n_tokens, sizes["head_dim"])
    layers: dict[str, list] = {}
    generator = torch.Generator(options.device).manual_seed(0)

    def rows(shape):
        return torch.randn(shape, generator=generator, device=options.device).to(torch.bfloat16)

    for _ in range(n_layers):
        k, v, prompt_q = rows(kv_shape), rows(kv_shape), rows(q_shape).expand(-1, -1, 1, -1)
        for name, contestant in peers.contestants(module).items():
            if names is not None and name not in names:
                continue
            if name == UNFUSED and batch * n_tokens > 2**19:
                # it copies K and V per query head
                continue
            _fill(contestant, module, k, v, prompt_q)
            new = rows(q_shape), k[:, :, :1], v[:, :, :1]
            held = contestant.cache.layers[0].store.logical_rows() if hasattr(contestant.cache, "codec") else (k, v)
            expected = _exact(*new, *held, module.scaling)
            out = contestant.step(*new).double()
            wrong = ((out - expected).norm() / expected.norm()).item()
            limit = next(limit for key, limit in TOLERANCE.items() if key in name)
            if not wrong < limit:
                raise AssertionError(f"{name}: relative error {wrong:.3g} is over {limit}; nothing was timed")
            exact = _exact(*new, k, v, module.scaling)
            error = ((out - exact).norm() / exact.norm()).item()
            layers.setdefault(name, []).append((contestant, new, error))
    turns = {name: 0 for name in layers}

    def stepper(name):
        def step():
            contestant, new, _ = layers[name][turns[name] % n_layers]
            turns[name] += 1
            contestant.step(*new)

        return step

    times = interleaved({name: stepper(name) for name in layers}, options.rounds, options.device)
    base = times[BASELINE]["ms"]
    return [
        {
            "shape": shape,
            "cache": name,
            "batch": batch,
            "tokens": n_tokens,
            "ms": times[name]["ms"],
            "min": times[name]["min"],
            "max": times[name]["max"],
            "x stock": base / times[name]["ms"],
            "MiB": _nbytes(layers[name][0][0].cache) / 2**20,
            "error": layers[name][0][2],
        }
        for name in layers
    ]


def _fill(contestant, module, k, v, q) -> None:
    """Bring a cache to the state after a prompt; only its last query is computed, the rest would only cost time."""
    cache = contestant.cache
    keys, _ = cache.update(k, v, 0)
    if hasattr(keys, "layer"):
        call = AttentionCall(keys, q.expand(-1, -1, 2, -1), module=module)
        keys.cache.meet(call)
        keys.layer.prepare(call)
        keys.layer.compress(call)


def _exact(q, new_k, new_v, k, v, scaling):
    """Float64 attention of one query over the exact rows, `[B, 1, Hq, D]`."""
    groups = q.shape[1] // k.shape[1]
    q = q.double().unflatten(1, (k.shape[1], groups)).squeeze(3)  # [B, Hkv, G, D]
    k, v = torch.cat([k, new_k], 2).double(), torch.cat([v, new_v], 2).double()
    weights = torch.softmax(q @ k.transpose(2, 3) * scaling, -1)
    return (weights @ v).flatten(1, 2).unsqueeze(1)


def _nbytes(cache) -> int:
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(_tensor_bytes(value) for layer in cache.layers for value in vars(layer).values())


def _tensor_bytes(value) -> int:
    """Bytes of a tensor, of the parts of a quantised one, or of nothing."""
    if not isinstance(value, torch.Tensor):
        return 0
    if type(value) is not torch.Tensor and hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return sum(_tensor_bytes(getattr(value, name)) for name in names)
    return value.numel() * value.element_size()
