"""Time of Python per layer and decode step, beyond that of transformers' own cache.

python benchmarks/host_time.py                        # this tree
python benchmarks/host_time.py --base ../other-tree   # and another one, in turn, in the same run

The model is random: 32 layers of hidden size 64, batch 1, a text of 100 tokens, one thread. What is timed is the CPU
time of the thread, the median over rounds; both trees and `DynamicCache` take turns, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from hf_kvcache.bench.environment import environment

ROOT = Path(__file__).parents[1]
N_LAYERS, N_STEPS, N_TOKENS = 32, 40, 100

WORKER = """
import importlib.abc, importlib.util, json, sys, time
from pathlib import Path

root = Path(sys.argv[1])


class Tree(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        parts = name.split(".")
        if parts[0] != "hf_kvcache":
            return None
        home = root / "src" / Path(*parts)
        if parts[:2] == ["hf_kvcache", "kernels"] and len(parts) > 2 and not home.with_suffix(".py").exists():
            home = root / Path(*parts[1:])
        if (home / "__init__.py").exists():
            return importlib.util.spec_from_file_location(
                name, home / "__init__.py", submodule_search_locations=[str(home)])
        file = home.with_suffix(".py")
        return importlib.util.spec_from_file_location(name, file) if file.exists() else None


sys.meta_path.insert(0, Tree())
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
import hf_kvcache as kv
from hf_kvcache.compat import cache_argument

assert str(root) in kv.__file__
torch.set_num_threads(1)
torch.manual_seed(0)
n_layers, n_steps, n_tokens = (int(x) for x in sys.argv[2:5])
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=n_layers, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=128)).eval()
ids = torch.arange(n_tokens).unsqueeze(0) % 128
CACHES = {
    "stock": DynamicCache,
    "dense": kv.KVCache,
    "quant4": lambda: kv.QuantCache(4, window=16),
    "snapkv": lambda: kv.EvictionCache("snapkv", budget=80),
    "adakv": lambda: kv.EvictionCache("adakv", budget=80, window=8),
}


def seconds(name):
    cache = CACHES[name]()
    model.set_attn_implementation("sdpa" if name == "stock" else "hf_kvcache")
    with torch.no_grad():
        model(ids, **cache_argument(cache))
        model(ids[:, :1], **cache_argument(cache))
        start = time.thread_time()
        for _ in range(n_steps):
            model(ids[:, :1], **cache_argument(cache))
        return time.thread_time() - start


for line in sys.stdin:
    print(json.dumps({name: seconds(name) for name in CACHES}), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="another tree of this project, to compare with")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of which the median counts")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "host-time-cpu.json")
    arguments = parser.parse_args()
    trees = {"here": ROOT} | ({} if arguments.base is None else {"base": arguments.base.resolve()})
    sizes = [str(n) for n in (N_LAYERS, N_STEPS, N_TOKENS)]
    workers = {
        name: subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tree), *sizes], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name, tree in trees.items()
    }
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    # the first round builds and imports what is used for the first time
    for _ in range(arguments.rounds + 1):
        for name, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            seen[name].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    found = {}
    for name, rounds in seen.items():
        steps = N_LAYERS * N_STEPS
        over = {
            cache: statistics.median((r[cache] - r["stock"]) / steps * 1e6 for r in rounds[1:])
            for cache in rounds[0]
            if cache != "stock"
        }
        found[name] = {cache: round(us, 1) for cache, us in over.items()}
        print(name, "us per layer and step beyond DynamicCache:", found[name])
    sizes = {"layers": N_LAYERS, "steps": N_STEPS, "tokens": N_TOKENS, "rounds": arguments.rounds}
    result = environment() | {"threads": 1} | sizes | {"us": found}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
