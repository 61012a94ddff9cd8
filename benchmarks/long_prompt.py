"""What a long prompt takes while it is read: peak memory and time by length, in a fresh process per contestant."""

from __future__ import annotations

import json
import os
import subprocess
import sys

CONTESTANTS = {
    "LocretCache": "kv.LocretCache(budget={budget}, chunk={chunk}, local=100)",
    "LocretCache + 8 bit": "kv.LocretCache(budget={budget}, chunk={chunk}, codec=kv.Quantize(8, axis='token'))",
    "SnapKV": "kv.EvictionCache('snapkv', budget={budget})",
    "AdaKV over SnapKV": "kv.EvictionCache('adakv', budget={budget})",
    "StreamingLLM": "kv.EvictionCache('streaming', budget={budget})",
    "DynamicCache, in chunks": "DynamicCache()",
    "DynamicCache": "DynamicCache()",
}
CHILD = """
import json, sys, threading, time
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
import hf_kvcache as kv
from hf_kvcache.adapters import RetainingHeads, attach
from hf_kvcache.compat import cache_argument

task = json.loads(sys.argv[1])
device, n_tokens, chunk = task["device"], task["tokens"], task["chunk"]
torch.manual_seed(0)
attn = "hf_kvcache" if "kv." in task["make"] else "sdpa"
if task["config"] is None:
    model = AutoModelForCausalLM.from_pretrained(kv.embedded_model(), dtype=torch.float32, attn_implementation=attn)
    attach(model, str(kv.embedded_heads()))
else:
    from transformers import LlamaConfig
    config = LlamaConfig(**task["config"])
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn)
    attach(model, RetainingHeads.new(model, d_r=256))
model = model.eval().to(device)
ids = torch.randint(3, model.config.vocab_size - 1, (1, n_tokens), device=device)

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024

def fill(tokens):
    cache = eval(task["make"])
    if task["name"] == "DynamicCache":
        with torch.no_grad():
            model.model(tokens[:, :-1], **cache_argument(cache), use_cache=True)
    else:
        kv.prefill(model, tokens, cache, chunk=chunk)
    return cache

fill(ids[:, : 2 * chunk + 130])  # what is loaded on first use is not the prompt's
if device == "cuda":
    torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
else:
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
started = time.perf_counter()
cache = fill(ids)
if device == "cuda":
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
else:
    peak = status("VmHWM")
seconds = time.perf_counter() - started
out = model.generate(ids, **cache_argument(cache), max_new_tokens=8, do_sample=False)
assert out.shape[1] == n_tokens + 8
print(json.dumps({"peak": peak - before, "whole": peak, "nbytes": getattr(cache, "nbytes", None), "seconds": seconds}))
"""
LLAMA_8B = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
)  # fmt: skip


def long_prompt(options) -> list[dict]:
    """Peak memory while a prompt is read into a budget, by its length: the embedded model, or an 8B shape on a GPU."""
    if options.device == "cpu":
        config, lengths, budget, chunk = None, (4096, 8192, 16384, 32768, 65536), 1024, 1024
    else:
        config, lengths, budget, chunk = LLAMA_8B, (16384, 32768, 65536, 131072), 16384, 4096
    rows = []
    for name, make in CONTESTANTS.items():
        for n_tokens in lengths:
            # a forward pass over a long prompt at once takes memory by its length, and time by the square of it
            if name.startswith("DynamicCache") and options.device == "cpu" and n_tokens > 16384:
                continue
            task = {
                "name": name,
                "make": make.format(budget=budget, chunk=chunk),
                "device": options.device,
                "tokens": n_tokens,
                "chunk": chunk,
                "config": config,
            }
            found = _run(task)
            rows.append(
                {
                    "cache": name,
                    "tokens": n_tokens,
                    "peak MiB": found["peak"] / 2**20,
                    "whole process MiB": found["whole"] / 2**20,
                    "cache MiB": None if found["nbytes"] is None else found["nbytes"] / 2**20,
                    "tokens/s": n_tokens / found["seconds"],
                }
            )
    return rows


def _run(task) -> dict:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(task)],
        capture_output=True,
        text=True,
        # large blocks go back to the system when freed, so that resident memory tells the truth
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
    )
    if child.returncode:
        raise RuntimeError(f"{task['name']}, {task['tokens']} tokens: {child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def picture(rows: list[dict], path) -> None:
    """Peak memory of the process over the length of the prompt, a curve per cache."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["cache"] for row in rows):
        own = [row for row in rows if row["cache"] == name]
        axes.plot([row["tokens"] for row in own], [row["peak MiB"] for row in own], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="peak memory while it is read, MiB")
    axes.set_xticks(sorted({row["tokens"] for row in rows}), minor=False)
    axes.set_xticklabels([f"{n // 1024}K" for n in sorted({row["tokens"] for row in rows})])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
