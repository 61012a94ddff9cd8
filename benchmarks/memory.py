"""What the process really holds: a prompt's cache, in a fresh process per contestant."""

from __future__ import annotations

import json
import os
import subprocess
import sys

SHAPE = {"batch": 1, "kv_heads": 8, "head_dim": 128, "tokens": 16384, "layers": 8}
CONTESTANTS = {
    "DynamicCache": "DynamicCache()",
    "KVCache": "kv.KVCache()",
    "QuantCache 8 bit": "kv.QuantCache(8)",
    "QuantCache 4 bit": "kv.QuantCache(4)",
    "QuantCache 3 bit": "kv.QuantCache(3)",
    "QuantCache 2 bit": "kv.QuantCache(2)",
    "SparseCache 50 %": "kv.SparseCache(0.5)",
    "SparseCache 70 %": "kv.SparseCache(0.7)",
    "SparseCache 70 % index": 'kv.SparseCache(0.7, layout="index")',
    "SparseCache 70 % + 4 bit": "kv.SparseCache(0.7, bits=4)",
    "LowRankCache 50 % post-RoPE": 'kv.LowRankCache(0.5, rope="post")',
    "LowRankCache 50 % post-RoPE + 4 bit": 'kv.LowRankCache(0.5, bits=4, rope="post")',
    "EvictionCache keydiff 25 %": 'kv.EvictionCache("keydiff", ratio=0.25)',
    "keydiff 50 % + 8 bit": "kv.QuantCache(8, policy=kv.KeyDiff(ratio=0.5))",
}
CHILD = """
import gc, json, sys
import torch
from transformers import DynamicCache
import hf_kvcache as kv
from hf_kvcache.attention.call import AttentionCall
shape = json.loads(sys.argv[1])
on_gpu = sys.argv[3] == "cuda"
rows = (shape["batch"], shape["kv_heads"], shape["tokens"], shape["head_dim"])

def resident():
    gc.collect()
    if on_gpu:
        return torch.cuda.memory_allocated()
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096

def fill(cache, layers):
    for layer in range(layers):
        k, v = (torch.randn(rows, dtype=torch.bfloat16, device=sys.argv[3]) for _ in range(2))
        keys, _ = cache.update(k, v, layer)
        if isinstance(keys, kv.KVView):
            keys.layer.compress(AttentionCall(keys, k[:, :, -2:]))
    return cache

with torch.no_grad():
    fill(eval(sys.argv[2]), 1)  # native code, thread pools and allocator pools are not the cache
    before = resident()
    cache = fill(eval(sys.argv[2]), shape["layers"])
    print(json.dumps({"process": resident() - before, "nbytes": getattr(cache, "nbytes", None)}))
"""


def process_memory(options) -> list[dict]:
    """Growth of the process while a cache of 8 layers and 16K tokens (bf16, 8 x 128) is filled."""
    rows, dense = [], None
    for name, make in CONTESTANTS.items():
        child = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps(SHAPE), make, options.device],
            capture_output=True,
            text=True,
            check=True,
            # large blocks go back to the system when freed, so that resident memory tells the truth
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
        )
        found = json.loads(child.stdout.splitlines()[-1])
        dense = dense or found["process"]
        rows.append(
            {
                "cache": name,
                "process MiB": found["process"] / 2**20,
                "nbytes MiB": None if found["nbytes"] is None else found["nbytes"] / 2**20,
                "x dense": found["process"] / dense,
            }
        )
    return rows
