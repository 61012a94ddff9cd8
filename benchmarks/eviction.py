"""What eviction costs in quality at equal budgets: answers found, keys found, and how far predictions move.

Every row is one cache. The context is read before anything is asked, so no policy knows the questions. The embedded
model's retaining heads were trained on the first half of the package's prose; only the second half is used here.
"""

from __future__ import annotations

from functools import partial

import torch
from pruning import model_and_text
from transformers import AutoTokenizer, DynamicCache

import hf_kvcache as kv
from hf_kvcache.adapters import attach
from hf_kvcache.compat import cache_argument
from hf_kvcache.eval import passkey, retrieval
from hf_kvcache.eval.fidelity import build_windows, dense_logits, fidelity
from hf_kvcache.long_prompts import begin

RATIOS = (0.25, 0.125, 0.0625)
POLICIES = {
    "Locret": lambda ratio: kv.Locret(ratio=ratio, n_recent=32, stabilizers=32),
    "SnapKV": lambda ratio: kv.SnapKV(ratio=ratio),
    "PyramidKV": lambda ratio: kv.PyramidKV(ratio=ratio),
    "H2O": lambda ratio: kv.H2O(ratio=ratio),
    "TOVA": lambda ratio: kv.TOVA(ratio=ratio),
    "NACL": lambda ratio: kv.NACL(ratio=ratio),
    "KeyDiff": lambda ratio: kv.KeyDiff(ratio=ratio),
    "L2Norm": lambda ratio: kv.L2Norm(ratio=ratio),
    "ExpectedAttention": lambda ratio: kv.ExpectedAttention(ratio=ratio),
    "LagKV": lambda ratio: kv.LagKV(ratio=ratio),
    "KVzip": lambda ratio: kv.KVzip(ratio=ratio),
    "RKV": lambda ratio: kv.RKV(ratio=ratio),
    "StreamingLLM": lambda ratio: kv.Streaming(ratio=ratio),
    "Random": lambda ratio: kv.Random(ratio=ratio),
    "AdaKV over Locret": lambda ratio: kv.AdaKV(
        ratio=ratio, scorer=kv.Locret(ratio=ratio, n_recent=32, stabilizers=32), n_recent=32
    ),
    "AdaKV over SnapKV": lambda ratio: kv.AdaKV(ratio=ratio, scorer="snapkv"),
    "AdaKV over ExpectedAttention": lambda ratio: kv.AdaKV(ratio=ratio, scorer="expected_attention"),
    "AdaKV over KeyDiff": lambda ratio: kv.AdaKV(ratio=ratio, scorer="keydiff"),
    "KeyDiff, merging": lambda ratio: kv.Merge.over(kv.KeyDiff(ratio=ratio)),
}
WINDOWS, NEXT = 4, 256
TASK_TOKENS, PROMPTS, QUESTIONS, SINGLES = 1024, 8, 64, 64


@torch.no_grad()
def eviction(options) -> list[dict]:
    """Retrieval, passkeys, perplexity and KL by policy and share of the tokens kept."""
    model, ids = model_and_text(options)
    ids = ids[len(ids) // 2 :]
    attach(model, str(options.adapter or kv.embedded_heads()))
    tokenizer = AutoTokenizer.from_pretrained(options.model or kv.embedded_model())
    ask, find = _tasks(tokenizer, ids)
    n_next = min(NEXT, options.context // 2)
    windows = build_windows(ids, options.context - n_next, n_next, WINDOWS, model.config.bos_token_id)
    dense = dense_logits(model, windows, options.context - n_next)
    base = DynamicCache()
    model(windows[:1], **cache_argument(base), logits_to_keep=1)
    n_dense = sum(layer.keys.nbytes + layer.values.nbytes for layer in base.layers)

    def measure(name, ratio, make):
        cache = make()
        model(begin(model, windows[:1], cache), **cache_argument(cache), logits_to_keep=1)
        if isinstance(cache, kv.KVCache):
            # what waits for the next chunk counts as what it will be
            for layer in cache.layers:
                layer.finish()
        scores = fidelity(model, windows, options.context - n_next, dense, make)
        return {
            "policy": name,
            "kept": ratio,
            "bytes": getattr(cache, "nbytes", n_dense) / n_dense,
            "retrieval": ask(model, make_cache=make),
            "passkey": find(model, make_cache=make),
            "perplexity": scores.perplexity,
            "KL": scores.kl,
        }

    rows = [measure("everything", 1.0, DynamicCache)]
    for ratio in RATIOS:
        for name, make in POLICIES.items():
            window = 16 if name.startswith(("AdaKV", "KVzip")) else 64
            cache = partial(_cache, make, ratio, window)
            rows.append(measure(name, ratio, cache))
    return rows


def _cache(make, ratio, window):
    return kv.KVCache(make(ratio), window=window)


def _tasks(tokenizer, ids):
    """Many facts in one context asked one after another, and one fact in each of many contexts."""
    prose, size = ids.numpy(), {"n_tokens": TASK_TOKENS, "seed": 1}
    try:
        ledger = retrieval.Ledger.from_tokenizer(tokenizer)
    except ValueError:
        many = passkey.build_prompts(tokenizer, prose, n_prompts=PROMPTS, n_facts=8, **size)
        one = passkey.build_prompts(tokenizer, prose, n_prompts=SINGLES, n_facts=1, **size)
        return partial(passkey.exact_match, prompts=many), partial(passkey.exact_match, prompts=one)

    def ask(n_prompts, n):
        prompts = retrieval.build_prompts(ledger, prose, n_prompts=n_prompts, n_questions=n, n_entries=n, **size)
        return partial(retrieval.exact_match, prompts=prompts)

    return ask(PROMPTS, QUESTIONS), ask(SINGLES, 1)
