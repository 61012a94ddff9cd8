"""What low rank costs in quality: what is known of the model, how ranks are shared out, where keys are projected.

Every row is one cache; the model predicts a text through it, in float32, and is compared with itself without a cache.
Bases are calibrated on the first two thirds of the text, and judged on the last.
"""

from __future__ import annotations

import functools

import torch
from pruning import NEXT, model_and_text

import hf_kvcache as kv
from hf_kvcache.calibration import fit_bases
from hf_kvcache.calibration.text import token_batches
from hf_kvcache.compat import cache_argument
from hf_kvcache.eval.fidelity import build_windows, dense_logits, fidelity

SAMPLES = 16
SHOWN = 6
BEST = {"directions": "gradient", "allocator": "measured"}
# name -> arguments of `fit_bases`
WAYS = {
    "calibrated: gradients, measured ranks": BEST,
    "gradients, greedy ranks": {"directions": "gradient", "allocator": "greedy"},
    "gradients, uniform ranks": {"directions": "gradient", "allocator": "uniform"},
    "gradients, Fisher ranks (Palu)": {"directions": "gradient", "allocator": "fisher"},
    "gradients, condition-number ranks (LoRC)": {"directions": "gradient", "allocator": "condition"},
    "principal components, measured ranks": {"directions": "rows", "allocator": "measured"},
    "principal components, Fisher ranks": {"directions": "rows", "allocator": "fisher"},
    "principal components, uniform ranks": {"directions": "rows", "allocator": "uniform"},
    "SVD of the weights, uniform ranks": {"directions": "weights", "allocator": "uniform"},
    "values per head": BEST | {"group_size_v": 1},
    "keys joint, too": BEST | {"group_size_k": "all"},
    "keys after RoPE": BEST | {"rope": "post"},
}
# at half the rank everything is compared, at other ranks what shows where quality falls
SHARES = (0.5, 0.75, 0.35, 0.25)
KNEE = (
    "calibrated: gradients, measured ranks",
    "principal components, Fisher ranks",
    "SVD of the weights, uniform ranks",
    "keys after RoPE",
)


@torch.no_grad()
def projection(options) -> list[dict]:
    """Perplexity and KL by way of calibration and rank, beside other caches of about the same bytes."""
    model, ids = model_and_text(options)
    size = min(options.context, getattr(model.config, "max_position_embeddings", options.context))
    n_next = min(NEXT, size // 2)
    cut = len(ids) * 2 // 3
    texts = {
        "pre": list(token_batches(ids[:cut], min(size, 512), SAMPLES)),
        # keys after RoPE turn with the position, and have to be seen where they will be
        "post": list(token_batches(ids[:cut], size, SAMPLES)),
    }
    windows = build_windows(ids[cut:], size - n_next, n_next, SHOWN, model.config.bos_token_id)
    dense = dense_logits(model, windows, size - n_next)
    window = min(32, size // 8)
    score = functools.partial(fidelity, model, windows, size - n_next, dense)
    exact = score(kv.KVCache)

    def row(group, name, setting, make):
        scores, cache = score(make), make()
        model(windows[:1, : size - n_next], **cache_argument(cache), logits_to_keep=1)
        return {
            "group": group,
            "cache": name,
            "setting": setting,
            "packed bytes, of dense": packed_share(cache),
            "perplexity": scores.perplexity,
            "change %": 100 * (scores.perplexity / exact.perplexity - 1),
            "KL": scores.kl,
        }

    rows = []
    for share in SHARES:
        for name, how in WAYS.items():
            if share != 0.5 and name not in KNEE:
                continue
            try:
                bases = fit_bases(model, texts[how.get("rope", "pre")], rank=share, **how)
            except ValueError:
                # the smallest ranks cost more than this share
                continue
            make = functools.partial(kv.LowRankCache, bases=bases, rope=bases.rope, window=window)
            rows.append(row("calibration", name, f"{share:.0%}", make))
            if how is BEST and share == 0.5:
                for bits in (8, 4, 3, 2):
                    for mix in (True, False):
                        name = "latents rotated" if mix else "latents not rotated"
                        quantised = functools.partial(make, bits=bits, mix=mix)
                        rows.append(row("quantised latents", name, f"50%, {bits} bit", quantised))
        for rope in ("pre", "post"):
            make = functools.partial(kv.LowRankCache, share, rope=rope, window=window)
            rows.append(row("fitted to the prompt", f"keys {rope}-RoPE", f"{share:.0%}", make))
        for policy in ("streaming", "keydiff"):
            make = functools.partial(kv.EvictionCache, policy, ratio=share)
            rows.append(row("eviction", policy, f"{share:.0%}", make))
    for bits in (8, 4, 2):
        make = functools.partial(kv.QuantCache, bits, window=window)
        rows.append(row("quantised rows", "QuantCache", f"{bits} bit", make))
    return rows


def packed_share(cache) -> float:
    """Bytes of packed rows of all layers, with positions, as a share of the same rows dense, in 16 bits."""
    packed = dense = 0.0
    for layer in cache.layers:
        store = layer.store
        if store.keys is None:
            packed, dense = packed + store.n_kept, dense + layer.tokens_seen
            continue
        row = sum(side.nbytes_per_token(layer.head_dim, 2) for side in (store.keys, store.values))
        packed += layer.n_kv_heads * row + 4 * store.needs_positions
        dense += layer.n_kv_heads * 2 * layer.head_dim * 2
    return packed / dense
