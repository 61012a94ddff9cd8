"""What caches do on models that several processes share.

    torchrun --nproc-per-node 2 sharded.py MODELS ANSWERS [JOB ...]

runs the jobs on the models in the folder MODELS; every process leaves its answers in the folder ANSWERS.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "adapters")]

from cases import BY_ID, CASES, KNOBS, padded, random_basis  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import hf_kvcache as kv  # noqa: E402
from hf_kvcache import dmc  # noqa: E402
from hf_kvcache.adapters import Bases, attach  # noqa: E402
from hf_kvcache.adapters.decompose import decompose  # noqa: E402
from hf_kvcache.calibration import observe  # noqa: E402
from hf_kvcache.compat import cache_argument  # noqa: E402

IDS, MASK, _ = padded([60, 41])
RANK = int(os.environ.get("RANK", 0))


def run(make, model, work=None, rows=2, **options) -> dict:
    """Greedy continuation of a padded batch, and what this process holds at the end."""
    cache = make()
    options = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True) | options
    out = model.generate(IDS[:rows], attention_mask=MASK[:rows], **cache_argument(cache), **options)
    ours = [layer for layer in cache.layers if hasattr(layer, "store")]
    return {
        "tokens": out.sequences[:, IDS.shape[1] :].tolist(),
        "logits": torch.stack(out.logits),
        "nbytes": sum(layer.nbytes for layer in ours),
        "common": sum(common_bytes(buffer) for layer in ours for buffer in layer.store.buffers().values()),
        "lengths": [layer.store.packed.lengths for layer in ours if getattr(layer.store, "is_ragged", False)],
        "heads": {layer.n_kv_heads for layer in ours},
    }


def common_bytes(buffer) -> int:
    """Bytes of what a layer has once for all heads: where its rows are in the text."""
    rows = buffer.tensors.get("position_ids")
    return 0 if rows is None or rows.shape[1] > 1 else rows.untyped_storage().nbytes()


def bases_of(config, group_size) -> Bases:
    layers = {}
    for i in range(config.num_hidden_layers):
        sizes = config.num_key_value_heads, config.head_dim, group_size, 8
        layers[i] = {side: random_basis(*sizes, seed=2 * i + (side == "v")) for side in "kv"}
    return Bases(layers=layers, rope="pre")


def with_bases(model, work, group_size=2, bits=None, **options) -> dict:
    attach(model, bases_of(model.config, group_size))
    return run(partial(kv.LowRankCache, bits=bits, window=8), model)


def with_heads(model, work, **options) -> dict:
    attach(model, work / f"heads-{model.config.model_type}")
    return run(partial(kv.LocretCache, budget=24, local=4, interval=4, **options), model)


def read_twice(model, work) -> dict:
    """Heads of all processes share a budget over all layers."""

    def make():
        cache = kv.EvictionCache("kvzip", budget=44, n_sink=2, window=4)
        kv.prefill(model, IDS, cache, attention_mask=MASK)
        return cache

    return run(make, model)


def with_its_own(model, work) -> dict:
    """A model that brings its cache: a retrofit, or an exported one, whose code is in its folder."""
    return run(model.new_cache, model)


def refused(do, *given) -> dict:
    """The error that something raises."""
    try:
        do(*given)
    except (ValueError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


def saved(model, work) -> dict:
    """A saved cache goes on where it was; as another process's it is refused."""

    def read(rank):
        cache = kv.KVCache.load(work / f"cache-{rank}")
        return model(IDS[:, -1:], attention_mask=MASK, **cache_argument(cache)).logits

    cache = kv.QuantCache(4, window=8)
    model(IDS[:, :-1], attention_mask=MASK[:, :-1], **cache_argument(cache))
    cache.save(work / f"cache-{RANK}")
    expected = model(IDS[:, -1:], attention_mask=MASK, **cache_argument(cache)).logits
    same = torch.equal(read(RANK), expected)
    if "RANK" not in os.environ:
        return {"goes on": same, "error": None}
    torch.distributed.barrier()
    return {"goes on": same} | refused(read, 1 - RANK)


def spanning(model, work) -> dict:
    return refused(with_bases, model, work, 4)


def whole_weights(model, work) -> dict:
    """What asks for whole weights, or for all heads at once."""
    bases = bases_of(model.config, 1)
    asked = {
        "decompose": lambda: decompose(model, bases),
        "observe": lambda: observe(model, [IDS], group_sizes={"k": 1, "v": 1}),
    }
    return {name: refused(do)["error"] for name, do in asked.items()}


POLICIES = {
    "tova": lambda: kv.TOVA(budget=24, **KNOBS),
    "random": lambda: kv.Random(budget=24, **KNOBS),
    "nacl": lambda: kv.NACL(budget=24, n_queries=4, **KNOBS),
    "rkv": lambda: kv.RKV(budget=24, n_queries=4, **KNOBS),
    "l2norm": lambda: kv.L2Norm(budget=24, **KNOBS),
    "lagkv": lambda: kv.LagKV(budget=24, lag=4, **KNOBS),
    "fastgen": lambda: kv.FastGen(recovery=0.5, n_sink=2, n_recent=8),
    "adakv-tova": lambda: kv.AdaKV(scorer=kv.TOVA(budget=44, **KNOBS), budget=44, **KNOBS),
}
# name -> (model, what to do with it)
JOBS = {case.id: ("llama", partial(run, case.make)) for case in CASES if case.id != "lowrank-joint-v-window0"}
JOBS |= {name: ("llama", partial(run, partial(kv.KVCache, make(), window=4))) for name, make in POLICIES.items()}
# norms over heads, a window in every other layer, a fused projection whose output all processes have
for arch in ("qwen3", "gemma2", "phi3"):
    JOBS |= {f"{arch} {name}": (arch, partial(run, BY_ID[name].make)) for name in ("quant4-window8", "adakv-budget42")}
JOBS |= {
    "fitted online": ("llama", partial(run, lambda: kv.LowRankCache(rank=8, window=8))),
    "beams": ("llama", partial(run, BY_ID["quant4-window8"].make, num_beams=3, num_return_sequences=2)),
    "chunks": ("llama", partial(run, BY_ID["adakv-budget42"].make, prefill_chunk_size=16)),
    "drafts": ("llama", partial(run, BY_ID["quant8-window8"].make, prompt_lookup_num_tokens=3, rows=1)),
    "bases": ("four-heads", with_bases),
    "bases 4 bits": ("four-heads", partial(with_bases, bits=4)),
    "heads": ("qwen3", with_heads),
    "read twice": ("llama", read_twice),
    "heads, all tokens": ("llama", partial(with_heads, decode=True)),
    "saved": ("llama", saved),
    "spanning": ("four-heads", spanning),
    "whole weights": ("four-heads", whole_weights),
}
RETROFITS = {
    "dms": dict(method="dms"),
    "dms-linear": dict(method="dms", decision="linear", per="layer"),
    "dmc": dict(method="dmc"),
    "dmc-layer": dict(method="dmc", per="layer"),
    "dmc-linear": dict(method="dmc", decision="linear", window=0),
}
EXPORTED = ("exported-latents", "exported-locret", "exported-dmc-linear")
JOBS |= {name: (name, with_its_own) for name in (*RETROFITS, *EXPORTED)}


@torch.no_grad()
def answers(models: Path, names, **options) -> dict[str, dict]:
    found = {}
    for name in names:
        folder, do = JOBS[name]
        read = dmc.load if folder in RETROFITS else AutoModelForCausalLM.from_pretrained
        # exported code brings no attention implementation of its own
        how = {"trust_remote_code": True} if folder in EXPORTED else {"attn_implementation": "hf_kvcache"}
        model = read(models / folder, dtype=torch.float32, **how, **options).eval()
        model.generation_config.eos_token_id = None
        found[name] = do(model, work=models)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = answers(Path(sys.argv[1]), sys.argv[3:] or list(JOBS), tp_plan="auto")
    torch.save(found, Path(sys.argv[2]) / f"{RANK}.pt")
    torch.distributed.destroy_process_group()
