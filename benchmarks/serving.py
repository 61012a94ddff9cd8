"""What a retrofit buys in decoding speed: at a fixed batch, and in the same memory, where batches grow with the ratio.

Layers have the shape of Llama-3.1-8B and random weights; caches are filled as a retrofit at that ratio would have left
them, heads as unequal as trained ones are. A step is that of whole attention layers, projections included.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

import hf_kvcache as kv
from hf_kvcache.bench.timing import interleaved
from hf_kvcache.dmc import Settings
from hf_kvcache.dmc.retrofitting import retrofit as put

RATIOS = (1, 2, 4, 8)
# rows of the eight KV heads for every 16 rows on average
SPREAD = (32, 32, 16, 16, 8, 8, 8, 8)
METHODS = {"DMC": (kv.DMCCache, Settings("dmc", "linear")), "DMS": (kv.DMSCache, Settings("dms", "linear", window=256))}
STOCK = "DynamicCache + sdpa"


@torch.no_grad()
def serving(options) -> list[dict]:
    """Decode steps at 1, 2, 4 and 8 tokens per row."""
    if options.device == "cpu":
        return _compare(options, 1, 1, 8192, 1)
    rows = []
    for n_tokens, batch in ((8192, 8), (32768, 2)):
        # what a dense cache of a batch takes: the whole memory, but for weights and working space
        full = int(0.6 * torch.cuda.mem_get_info()[0] // (32 * 2 * 8 * 128 * 2 * n_tokens))
        rows += _compare(options, batch, max(full, 1), n_tokens, 32)
    return rows


def _compare(options, batch, full, n_tokens, n_layers) -> list[dict]:
    """Steps at a batch of `batch`, and at one of `full` times the ratio."""
    rows = []
    for fixed in (True, False):
        contestants, held, sizes = {}, {}, {}
        plans = {(STOCK, 1): None} | {(name, ratio): plan for name, plan in METHODS.items() for ratio in RATIOS}
        # on a GPU one contestant fills the memory, so they take turns whole
        for (name, ratio), plan in plans.items():
            size = batch if fixed else full * ratio
            step, cache, check = _contestant(plan, ratio, size, n_tokens, n_layers, options.device)
            wrong = check()
            if not wrong < 0.02:
                raise AssertionError(f"{name} at {ratio}: relative error {wrong:.3g}; nothing was timed")
            key = name if plan is None else f"{name} {ratio}x"
            contestants[key], sizes[key], held[key] = step, size, _nbytes(cache)
            if options.device == "cuda":
                rows += _times(options, {key: contestants.pop(key)}, sizes, held, fixed, n_tokens)
                del step, cache, check
                torch.cuda.empty_cache()
        if contestants:
            rows += _times(options, contestants, sizes, held, fixed, n_tokens)
    return rows


def _times(options, contestants, sizes, held, fixed, n_tokens) -> list[dict]:
    times = interleaved(contestants, options.rounds, options.device)
    return [
        {
            "cache": name,
            "what is equal": "batch" if fixed else "memory",
            "tokens": n_tokens,
            "batch": sizes[name],
            "ms": times[name]["ms"],
            "min": times[name]["min"],
            "max": times[name]["max"],
            "tokens/s": 1e3 * sizes[name] / times[name]["ms"],
            "cache MiB": held[name] / 2**20,
        }
        for name in contestants
    ]


@torch.no_grad()
def retrofit_prefill(options) -> list[dict]:
    """Reading a prompt with one such layer, where decisions fall at random at every ratio."""
    n_tokens = 6144 if options.device == "cpu" else 32768
    contestants, rows = {}, {}
    for (name, ratio), plan in ({(STOCK, 1): None} | {(m, r): p for m, p in METHODS.items() for r in RATIOS}).items():
        layer, rotary = _layers(plan, 1, options.device)
        hidden, cos_sin = _prompt(layer[0], plan, ratio, n_tokens, rotary, options.device)

        def read(layer=layer[0], plan=plan, hidden=hidden, cos_sin=cos_sin):
            cache = DynamicCache() if plan is None else plan[0]()
            layer(hidden, cos_sin, None, cache)
            return cache

        key = name if plan is None else f"{name} {ratio}x"
        held = _nbytes(read())
        contestants[key], rows[key] = read, {"cache": key, "tokens": n_tokens, "cache MiB": held / 2**20}
        if plan is not None and not 0.7 * ratio < n_tokens * 8 * 2 * 128 * 2 / held < 1.1 * ratio:
            raise AssertionError(f"{key}: the cache holds {held} bytes; nothing was timed")
    times = interleaved(contestants, options.rounds, options.device)
    base = times[STOCK]["ms"]
    return [row | times[key] | {"x dense": times[key]["ms"] / base} for key, row in rows.items()]


def _prompt(module, plan, ratio, n_tokens, rotary, device):
    """Hidden states, and weights of decisions by which a token goes with probability `1 - 1 / ratio`."""
    generator = torch.Generator(device).manual_seed(1)
    hidden = torch.randn(1, n_tokens, 4096, generator=generator, device=device).to(torch.bfloat16)
    hidden[..., 0] = 1
    if plan is not None:
        child, settings = module.kv_dmc, plan[1]
        torch.nn.init.normal_(child.decision, std=1 / 64)
        # the constant channel sets the share of positive logits
        share = torch.tensor(min(max(1 - 1 / ratio, 1e-6), 1 - 1e-6))
        child.decision[:, 0] = settings.offset / settings.scale + torch.special.ndtri(share)
    return hidden, rotary(hidden, torch.arange(n_tokens, device=device).unsqueeze(0))


def _layers(plan, n_layers, device):
    """Attention layers of that shape with random weights, retrofitted or not, and their RoPE."""
    config = LlamaConfig(
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        hidden_size=4096,
        num_hidden_layers=n_layers,
        attn_implementation="sdpa" if plan is None else "hf_kvcache",
        rope_parameters={"rope_theta": 500000.0, "rope_type": "default"},
    )
    torch.manual_seed(0)
    with torch.device(device):
        layers = torch.nn.ModuleList(LlamaAttention(config, i) for i in range(n_layers)).to(torch.bfloat16).eval()
        rotary = LlamaRotaryEmbedding(config)
    if plan is not None:
        put(layers, plan[1])
    return layers, rotary


def _contestant(plan, ratio, batch, n_tokens, n_layers, device):
    """A step of all layers, their cache, and how far the first layer's output is from float64."""
    layers, rotary = _layers(plan, n_layers, device)
    cache = DynamicCache() if plan is None else plan[0]()
    generator = torch.Generator(device).manual_seed(1)
    for layer in layers:
        _fill(cache, layer, plan, ratio, batch, n_tokens, generator)
    hidden = torch.randn(batch, 1, 4096, generator=generator, device=device).to(torch.bfloat16)
    cos_sin = rotary(hidden, torch.full((batch, 1), n_tokens, device=device))

    def step():
        for layer in layers:
            out = layer(hidden, cos_sin, None, cache)[0]
        return out

    def check():
        rows = None if plan is None else cache.layers[0].store.rows(0, cache.layers[0].store.packed.n_tokens)
        if plan is None:
            return 0.0
        before = cache.layers[0].store.packed.is_row
        seen = {}
        hook = layers[0].o_proj.register_forward_pre_hook(lambda module, args: seen.update(out=args[0]))
        layers[0](hidden, cos_sin, None, cache)
        hook.remove()
        return _distance(layers[0], hidden, cos_sin, rows, before, seen["out"])

    return step, cache, check


def _fill(cache, module, plan, ratio, batch, n_tokens, generator) -> None:
    """Rows at random, in the numbers that a retrofit at this ratio leaves."""
    device = generator.device

    def rows(n):
        return torch.randn(batch, 8, n, 128, generator=generator, device=device, dtype=torch.float32).to(torch.bfloat16)

    if plan is None:
        cache.update(rows(n_tokens), rows(n_tokens), module.layer_idx)
        return
    mean = n_tokens // ratio
    # no head can keep more than there is
    lengths = torch.tensor([mean if ratio == 1 else min(mean * share // 16, n_tokens) for share in SPREAD])
    most, settings = int(lengths.max()), plan[1]
    layer = cache.layer_for(module)
    k, v = rows(most), rows(most)
    layer._check(k[:, :, :1], v[:, :, :1])
    store = layer.store
    store.begin(batch, 8, settings.delay, device, torch.float32)
    store.dtype, store.head_dim, layer.all_begun, layer.tokens_seen = k.dtype, 128, True, n_tokens
    is_kept = torch.arange(most, device=device) < lengths.to(device).view(1, -1, 1)
    store.packed.append({"k.rows": k, "v.rows": v}, is_kept.expand(batch, -1, -1))
    # the newest tokens stand in the last rows, and all of them stay
    n_cells = store.ring.shape[-1]
    back = torch.arange(n_cells, device=device)
    newest = store.packed.lengths.unsqueeze(-1) - 1 - back
    store.ring[..., (n_tokens - 1 - back) % n_cells] = (2 * newest).clamp(min=-1).int()


def _distance(module, hidden, cos_sin, rows, is_row, out) -> float:
    """Relative error of the attention output against float64 over the same rows and the new one."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, v = (
        getattr(module, f"{side}_proj")(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for side in "qkv"
    )
    q, k = apply_rotary_pos_emb(q, k, *cos_sin)
    worst = 0.0
    for h in range(rows[0].shape[1]):
        heads = slice(4 * h, 4 * h + 4)
        mine = is_row[0, h]
        keys, values = (torch.cat([old[0, h][mine], new[0, h]]).double() for old, new in zip(rows, (k, v)))
        weights = torch.softmax(q[0, heads, 0].double() @ keys.T * module.scaling, -1)
        expected = (weights @ values).flatten()
        found = out[0, 0, 512 * h : 512 * (h + 1)].double()
        worst = max(worst, ((found - expected).norm() / expected.norm()).item())
    return worst


def _nbytes(cache) -> int:
    if isinstance(cache, kv.KVCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
