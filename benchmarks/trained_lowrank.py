"""Calibrated low rank on a real model: perplexity and KL by rank, bits and way of calibration, and its needles.

The continuation of four held-out texts is read through every cache, in float32, and compared with the dense model's
predictions; bases are calibrated on other books.
"""

from __future__ import annotations

import functools
import time

import torch
from projection import packed_share
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvcache as kv
from hf_kvcache.adapters import Bases
from hf_kvcache.calibration import fit_bases
from hf_kvcache.calibration.text import mixed_batches
from hf_kvcache.compat import cache_argument
from hf_kvcache.eval.fidelity import build_windows, dense_logits, fidelity
from hf_kvcache.models import resolve
from hf_kvcache.trainers.dmc_data import load_stream

SAMPLES, LENGTH = 12, 512
CONTEXT, NEXT, SHOWN, STEP = 384, 128, 4, 16
WINDOW = 64
GREEDY = {"directions": "gradient", "allocator": "greedy"}
# name -> share of the bytes, arguments of `fit_bases`, and of samples where they are not prose alone
WAYS = {
    "half, gradients": {"rank": 0.5, **GREEDY},
    "half, gradients, values per head": {"rank": 0.5, **GREEDY, "group_size_v": 1},
    "half, gradients, keys joint": {"rank": 0.5, **GREEDY, "group_size_k": "all"},
    "half, gradients, after RoPE": {"rank": 0.5, **GREEDY, "rope": "post"},
    "half, gradients, uniform ranks": {"rank": 0.5, "directions": "gradient", "allocator": "uniform"},
    "half, gradients, Fisher ranks (Palu)": {"rank": 0.5, "directions": "gradient", "allocator": "fisher"},
    "half, principal components, uniform ranks": {"rank": 0.5, "directions": "rows", "allocator": "uniform"},
    "half, gradients, measured ranks": {
        "rank": 0.5,
        "directions": "gradient",
        "allocator": "measured",
        "n_measured": 1,
    },
    "half, facts, keys joint": {
        **{"rank": 0.5, **GREEDY, "group_size_k": "all"},
        **{"prose_share": 0.25, "samples": 40, "length": 768},
    },
    "0.75, gradients": {"rank": 0.75, **GREEDY},
    "0.6, gradients": {"rank": 0.6, **GREEDY},
}
QUANTISED = {f"{bits}-bit rows": functools.partial(kv.QuantCache, bits, window=WINDOW) for bits in (8, 4, 2)}
BITS = (None, 8, 4)


def lowrank(options, rows) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        resolve(options.model), dtype=torch.float32, attn_implementation="hf_kvcache"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(resolve(options.model))
    held_out = torch.from_numpy(load_stream(options.data / "valid", tokenizer, SHOWN * (CONTEXT + NEXT))).long()
    windows = build_windows(held_out, CONTEXT, NEXT, SHOWN, model.config.bos_token_id)
    dense = dense_logits(model, windows, CONTEXT)
    score = functools.partial(fidelity, model, windows, CONTEXT, dense, step=STEP)
    exact = None

    def measure(name: str, make, **more) -> None:
        scores, cache = score(make), make()
        with torch.no_grad():
            model(windows[:1, :CONTEXT], **cache_argument(cache), logits_to_keep=1)
        change = 0.0 if exact is None else 100 * (scores.perplexity / exact - 1)
        share = packed_share(cache)
        rows.add(
            "lowrank", name, **{"packed bytes, of dense": share, "perplexity": scores.perplexity, "change %": change},
            KL=scores.kl, **more,
        )  # fmt: skip

    if not rows.has("lowrank", "dense"):
        measure("dense", kv.KVCache)
    exact = rows.rows["lowrank", "dense"]["perplexity"]
    for name, make in QUANTISED.items():
        if not rows.has("lowrank", name):
            measure(name, make)
    for name in options.only or WAYS:
        names = {bits: name if bits is None else f"{name}, {bits} bit" for bits in BITS}
        if all(rows.has("lowrank", each) for each in names.values()):
            continue
        bases, seconds = _bases(options, name, model, tokenizer)
        make = functools.partial(kv.LowRankCache, bases=bases, rope=bases.rope, window=WINDOW)
        for bits, each in names.items():
            if not rows.has("lowrank", each):
                measure(each, functools.partial(make, bits=bits), seconds=seconds, ranks=_mean_ranks(bases))


def _bases(options, name: str, model, tokenizer):
    """The bases of a way, from its folder or calibrated now, and the seconds that took."""
    folder = options.work / "bases" / "".join(c if c.isalnum() else "-" for c in name)
    if (folder / "adapter_config.json").exists():
        return Bases.load(folder), None
    start = time.monotonic()
    # the first ways were measured on prose alone, which the table needs for comparison
    arguments = {"prose_share": 1.0, "samples": SAMPLES, "length": LENGTH} | WAYS[name]
    prose_share, n, length = (arguments.pop(key) for key in ("prose_share", "samples", "length"))
    stream = torch.from_numpy(load_stream(options.data / "train", tokenizer, n * length)).long()
    bases = fit_bases(model, mixed_batches(tokenizer, stream, length, n, prose_share), **arguments)
    bases.save(folder)
    return bases, round(time.monotonic() - start)


def _mean_ranks(bases) -> dict[str, float]:
    """Mean latents per group of keys and of values."""
    ranks = list(bases.ranks.values())
    return {side: sum(own[side] for own in ranks) / len(ranks) for side in "kv"}
