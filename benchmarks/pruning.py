"""What pruning costs in quality: which channels are dropped, on which side, and how many.

Every row is one cache; the model predicts a text through it, in float32, and is compared with itself without a cache.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument
from hf_kvcache.eval.fidelity import build_windows, dense_logits, fidelity
from hf_kvcache.models import embedded_prose

WINDOWS, NEXT = 12, 256
RULES = {
    "magnitude per token": {},
    "output-aware per token": {"rule": "output_aware"},
    "magnitude per channel": {"axis": "channel"},
    "2:4": {"group_size": 4},
    "ThinK channels": {"rule": "think"},
}


@torch.no_grad()
def pruning(options) -> list[dict]:
    """Perplexity and KL by rule, side and sparsity, beside quantised caches of about the same bytes."""
    model, ids = model_and_text(options)
    size = min(options.context, getattr(model.config, "max_position_embeddings", options.context))
    n_next = min(NEXT, size // 2)
    windows = build_windows(ids, size - n_next, n_next, WINDOWS, model.config.bos_token_id)
    dense = dense_logits(model, windows, size - n_next)
    head_dim = model.config.head_dim

    def measure(make):
        cache = make()
        model(windows[:1, : size - n_next], **cache_argument(cache), logits_to_keep=1)
        scores = fidelity(model, windows, size - n_next, dense, make)
        return scores, cache.codec and [side.nbytes_per_token(head_dim, 2) / (2 * head_dim) for side in cache.codec]

    exact, _ = measure(kv.KVCache)
    rows = []
    for (side, rule, share), codec in _grid(head_dim).items():
        scores, (bytes_k, bytes_v) = measure(lambda codec=codec: kv.KVCache(codec=codec, window=32, n_sink=4))
        rows.append(
            {
                "side": side,
                "rule": rule,
                "setting": share,
                "bytes K": bytes_k,
                "bytes V": bytes_v,
                "perplexity": scores.perplexity,
                "change %": 100 * (scores.perplexity / exact.perplexity - 1),
                "KL": scores.kl,
            }
        )
    return rows


def _grid(head_dim: int) -> dict:
    """(side, rule, setting) -> codec, or pair of codecs."""
    grid = {}
    for sparsity in (0.5, 0.7):
        # the exact share: small heads would feel the rounding to a multiple of four
        keep = round((1 - sparsity) * head_dim)
        for rule, knobs in RULES.items():
            if rule == "2:4" and sparsity != 0.5:
                continue
            n = round((1 - sparsity) * 32) if knobs.get("axis") == "channel" else keep
            codec = kv.Sparse(keep=n, **knobs)
            sides = {"K": (codec, kv.Dense())}
            # the weight of a value row changes no order within it: output-aware values are the same as magnitude
            if rule != "output-aware per token":
                sides |= {"V": (kv.Dense(), codec), "K+V": codec}
            grid |= {(side, rule, f"{sparsity:.0%}"): pair for side, pair in sides.items()}
        for bits in (8, 4):
            chain = kv.Sparse(keep=-(-keep // 4) * 4) >> kv.Quantize(bits)
            grid["K+V", "magnitude per token >> quantised", f"{sparsity:.0%}, {bits} bit"] = chain
    for bits in (8, 4, 2):
        grid["K+V", "quantised", f"{bits} bit"] = kv.Quantize(bits)
    return grid


def model_and_text(options):
    path = options.model or kv.embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="hf_kvcache").eval()
    text = Path(options.text or embedded_prose()).read_text()
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    return model, ids
