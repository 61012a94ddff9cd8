"""What unequal heads cost: a decode step over pages, as the sum of the lengths and not as the longest one."""

from __future__ import annotations

import attention
import peers
import torch

import hf_kvcache as kv
from hf_kvcache.bench.timing import interleaved
from hf_kvcache.stores.ragged import RaggedStore

# rows of the eight KV heads for every 16 rows on average
SPREADS = {
    "equal": (16,) * 8,
    "4 : 1": (32, 32, 16, 16, 8, 8, 8, 8),
    "16 : 1": (64, 16, 16, 8, 8, 8, 4, 4),
    "one head": (121, 1, 1, 1, 1, 1, 1, 1),
}
CODECS = {
    "dense": None,
    "8 bit": kv.Quantize(8, axis="token"),
    "4 bit": kv.Quantize(4, axis="token"),
    "sparse 50 %": kv.Sparse(0.5),
}
BASELINE = "DynamicCache + sdpa, padded"


class Spread(kv.Duo):
    """Keeps as many of the newest rows per head as it is told, for measuring."""

    lengths: tuple = ()

    def select(self, scores, positions, tokens_seen, n_fixed, is_final=True):
        newest = torch.tensor(self.lengths, device=positions.device).view(1, -1, 1)
        return self.keep_only(positions >= tokens_seen - newest, positions, tokens_seen, n_fixed)


def heads(options) -> list[dict]:
    """A decode step at Llama-3.1-8B's layer shape, bf16: the same rows in all, spread evenly and not."""
    if options.device == "cpu":
        grid = [(1, 4096, 2)]
    else:
        grid = [(batch, n, 4) for n in (4096, 16384) for batch in (1, 4, 16)]
    return [row for batch, mean, n_layers in grid for row in _steps(options, batch, mean, n_layers)]


def _steps(options, batch, mean, n_layers) -> list[dict]:
    sizes = attention.SHAPES["Llama-3.1-8B"]
    module = peers.attention_module(**sizes)
    layers, held = {}, {}
    generator = torch.Generator(options.device).manual_seed(0)

    def rows(n_heads, n):
        shape = batch, n_heads, n, sizes["head_dim"]
        return torch.randn(shape, generator=generator, device=options.device).to(torch.bfloat16)

    def add(name, contestant, lengths, n_tokens):
        k, v, q = rows(8, n_tokens), rows(8, n_tokens), rows(32, 1)
        attention._fill(contestant, module, k, v, q)
        new = rows(32, 1), rows(8, 1), rows(8, 1)
        expected = _exact(contestant.cache, *new, k, v, lengths, module.scaling)
        out = contestant.step(*new)
        wrong = ((out.double() - expected).norm() / expected.norm()).item()
        if not wrong < 0.02:
            raise AssertionError(f"{name}: relative error {wrong:.3g}; nothing was timed")
        layers.setdefault(name, []).append((contestant, new))
        held[name] = sum(lengths) * batch, attention._nbytes(contestant.cache)

    for _ in range(n_layers):
        for spread, shares in SPREADS.items():
            lengths = tuple(mean * share // 16 for share in shares)
            longest = max(lengths)
            for codec_name, codec in CODECS.items():
                policy = Spread(gates=[[0] * 8], n_recent=32, n_sink=0, decode=False)
                policy.lengths = lengths
                cache = kv.KVCache(policy, codec, window=32)
                add(f"pages, {codec_name}, {spread}", peers.ours(cache, module), lengths, longest)
            if spread == "equal":
                add("KVCache, dense", peers.ours(kv.KVCache(), module), lengths, longest)
            # what a cache of one length for all heads must hold
            if batch * longest <= 2**19:
                stock = peers.stock(module)
                add(f"{BASELINE}, {spread}", stock, (longest,) * 8, longest)
    turns = dict.fromkeys(layers, 0)

    def stepper(name):
        def step():
            contestant, new = layers[name][turns[name] % n_layers]
            turns[name] += 1
            contestant.step(*new)

        return step

    times = interleaved({name: stepper(name) for name in layers}, options.rounds, options.device)
    base = times["pages, dense, equal"]["ms"]
    return [
        {
            "cache": name,
            "batch": batch,
            "rows": held[name][0],
            "ms": times[name]["ms"],
            "min": times[name]["min"],
            "max": times[name]["max"],
            "x equal pages": times[name]["ms"] / base,
            "MiB": held[name][1] / 2**20,
        }
        for name in layers
    ]


def _exact(cache, q, new_k, new_v, k, v, lengths, scaling):
    """Float64 attention over what each head keeps, as its codec reads it, and the new row."""
    outs = []
    for h, n in enumerate(lengths):
        store = cache.layers[0].store if hasattr(cache, "policy") else None
        own_k, own_v = (x[:, h : h + 1, -n:] for x in (k, v))
        if isinstance(store, RaggedStore):
            blocks = [torch.cat(side, 2) for side in zip(*store.blocks(4096))]
            is_row = store.positions[:, h] >= 0
            own_k, own_v = (x[:, h][is_row].view(x.shape[0], 1, -1, x.shape[3]) for x in blocks)
        heads = slice(4 * h, 4 * h + 4)
        out = attention._exact(q[:, heads], new_k[:, h : h + 1], new_v[:, h : h + 1], own_k, own_v, scaling)
        outs.append(out)
    return torch.cat(outs, 2)
