"""Side by side with kvpress: the same model and prompts, accuracy, real bytes and decoding time at equal budgets.

kvpress needs an older transformers, so it runs in an environment of its own; say where with `--kvpress-python`.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from eviction import POLICIES
from pruning import model_and_text
from transformers import AutoTokenizer, DynamicCache

import hf_kvcache as kv
from hf_kvcache.adapters import attach
from hf_kvcache.compat import cache_argument
from hf_kvcache.eval import retrieval

RATIOS = (0.25, 0.125)
PROMPTS, TOKENS, QUESTIONS, STEPS, LONG = 8, 1024, 64, 24, 16384


@torch.no_grad()
def against_kvpress(options) -> list[dict]:
    """Retrieval, bytes after the prompt and time per decoded token, kvpress and ours."""
    if options.kvpress_python is None:
        raise SystemExit("kvpress: --kvpress-python names the interpreter of an environment with kvpress")
    model, ids = model_and_text(options)
    path = str(options.model or kv.embedded_model())
    attach(model, str(options.adapter or kv.embedded_heads()))
    ledger = retrieval.Ledger.from_tokenizer(AutoTokenizer.from_pretrained(path))
    prompts = retrieval.build_prompts(
        ledger, ids[len(ids) // 2 :].numpy(), TOKENS, PROMPTS, n_questions=QUESTIONS, n_entries=QUESTIONS, seed=1
    )
    task = {
        "model": path,
        "ratios": RATIOS,
        "threads": torch.get_num_threads(),
        "n_steps": STEPS,
        "long": ids.repeat(-(-LONG // len(ids)))[:LONG].tolist(),
        "prompts": [
            {"context": c.tolist(), "asks": a.tolist(), "answers": w.tolist()}
            for c, a, w in zip(prompts.context, prompts.asks, prompts.answers)
        ],
    }
    long = torch.tensor([task["long"]])
    rows = [_ours("everything, DynamicCache", 1.0, DynamicCache, model, prompts, long)]
    rows += [{"library": "kvpress", **found} for found in _kvpress(options.kvpress_python, task)]
    for ratio in RATIOS:
        for name, make in POLICIES.items():

            def cache(make=make, name=name, ratio=ratio):
                return kv.KVCache(make(ratio), window=16 if name.startswith("AdaKV") else 64)

            rows.append(_ours(name, ratio, cache, model, prompts, long))
    return rows


def _kvpress(python, task) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "task.json"
        file.write_text(json.dumps(task))
        child = subprocess.run(
            [python, str(Path(__file__).parent / "kvpress_child.py"), str(file)], capture_output=True, text=True
        )
    if child.returncode:
        raise RuntimeError(child.stderr[-2000:])
    return [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]


def _ours(name, ratio, make, model, prompts, long) -> dict:
    is_ours = make is not DynamicCache
    model.set_attn_implementation("hf_kvcache" if is_ours else "sdpa")
    cache = make()
    model(prompts.context, **cache_argument(cache), logits_to_keep=1)
    for layer in cache.layers if is_ours else ():
        layer.finish()
    dense = 2 * 4 * sum(_row_width(model) for _ in cache.layers) * prompts.context.numel()
    nbytes = cache.nbytes if is_ours else dense
    return {
        "library": "hf_kvcache" if is_ours else "transformers",
        "policy": name,
        "kept": ratio,
        "retrieval": retrieval.exact_match(model, prompts, make),
        "bytes": nbytes / dense,
        "step ms": _decode(model, make, long),
    }


def _row_width(model) -> int:
    return model.config.num_key_value_heads * model.config.head_dim


def _decode(model, make, ids) -> float:
    """Milliseconds per decoded token after a long prompt, median."""
    cache, times = make(), []
    model(ids, **cache_argument(cache), logits_to_keep=1)
    token = ids[:, -1:]
    for _ in range(STEPS):
        started = time.perf_counter()
        token = model(token, **cache_argument(cache)).logits[:, -1:].argmax(-1)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2] * 1e3
