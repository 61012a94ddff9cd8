"""What `hf-kvcache tune` finds, against uniform settings of the same bytes, on texts that it has not seen.

    python benchmarks/tuning.py --model smollm2 --train DIR --valid DIR --work DIR --out benchmarks/results/NAME.json

Every uniform cache has one setting in all layers: bits, sparsity, a policy, or a policy over bits, whose ratio is set
so that its bytes come closest to the goal without going above. All caches answer the same texts, one after the other,
so that differences are paired. `--work` keeps configurations and scores: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from wide_linear import widen

import hf_kvcache as kv
from hf_kvcache.bench.environment import environment
from hf_kvcache.cache_config import KVCacheConfig
from hf_kvcache.eval.intervals import bootstrapped, difference_of, mean_of
from hf_kvcache.tuning.menu import BITS, SPARSE, codec_of
from hf_kvcache.tuning.probes import Probe, needle_texts, prose_texts
from hf_kvcache.tuning.tuner import WINDOWS, Goal, Tuner, described

GOALS = (0.25, 0.125, 0.0625)
POLICIES = {
    "keydiff": kv.KeyDiff,
    "snapkv": kv.SnapKV,
    "h2o": kv.H2O,
    "streaming": kv.Streaming,
    "kvzip": kv.KVzip,
}
SEEN, UNSEEN = 0, 1_000  # seeds of needles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True, help="folder of texts to tune on")
    parser.add_argument("--valid", required=True, help="folder of other texts")
    parser.add_argument("--work", required=True, help="folder for what a stopped run goes on with")
    parser.add_argument("--out", required=True, help="file of the results")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tune-texts", type=int, default=4)
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--needles", type=int, default=8)
    parser.add_argument("--goals", type=float, nargs="+", default=list(GOALS), help="bytes, as shares of dense")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), help="of uniform caches")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(options.model)
    tune(options, model, tokenizer, work)
    score(options, model, tokenizer, work)
    Path(options.out).write_text(json.dumps(summary(options, model, work), indent=1) + "\n")


def load(where: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_kvcache.models import resolve

    path = resolve(where)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="hf_kvcache").eval()
    widen(model)
    return model, AutoTokenizer.from_pretrained(path)


def documents(folder: str) -> list[str]:
    """The texts of a folder, from where their tables of contents are over."""
    found = [path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("*.txt"))]
    return [text[len(text) // 10 :] for text in found]


def config_of(work: Path, goal: float) -> Path:
    return work / f"tuned-{goal}.json"


def tune(options, model, tokenizer, work: Path) -> None:
    """Configurations for every goal that has none yet."""
    missing = [goal for goal in options.goals if not config_of(work, goal).exists()]
    if not missing:
        return
    texts = prose_texts(tokenizer, documents(options.train), options.context, 64, options.tune_texts)
    texts += needle_texts(tokenizer, options.context, options.tune_texts, SEEN)
    policies = [kv.KeyDiff(ratio=1.0), kv.SnapKV(ratio=1.0), kv.KVzip(ratio=1.0)]
    tuner = Tuner(model, texts, policies, [*BITS, *SPARSE], lambda stage: print(stage, flush=True))
    for goal in missing:
        found = tuner.tune(Goal(goal))
        KVCacheConfig.from_cache(found.cache, **described(found)).save(config_of(work, goal))


def uniform_caches(options, model, probe: Probe, file: Path) -> dict[str, dict]:
    """Uniform caches by name: how to make them, and their bytes; `file` keeps the shares of the tokens that fit."""
    shares = json.loads(file.read_text()) if file.exists() else {}
    dense, n = probe.nbytes, len(probe.text.context)
    codecs = {f"{b} bits": (kv.Quantize(int(b)), kv.Quantize(int(b))) for b in BITS}
    codecs |= {name.replace(":", ", ") + " bits": (codec_of(name),) * 2 for name in SPARSE}
    found = {}

    def ratio(make) -> float:
        return probe.filled(make()).nbytes / dense

    for goal in options.goals:
        window = next((w for w in WINDOWS if w <= goal * n / 6), WINDOWS[-1])
        for name, pair in codecs.items():
            make = lambda pair=pair, w=window: kv.KVCache(codec=pair, window=w, config=model.config)  # noqa: E731
            found[f"{name}, window {window}"] = {"make": make, "bytes_ratio": ratio(make)}
        for policy in options.policies:
            for bits in (None, "8", "4", "2"):
                pair = None if bits is None else (codec_of(bits),) * 2
                make = lambda r, k=POLICIES[policy], p=pair, w=window: kv.KVCache(  # noqa: E731
                    k(ratio=r), p, window=w, config=model.config
                )
                key = f"{goal} {policy} {bits}"
                if key not in shares:
                    shares[key] = largest(lambda r, make=make, goal=goal: ratio(lambda: make(r)) <= goal)
                    file.write_text(json.dumps(shares))
                share = shares[key]
                if share is None or share > 0.98:
                    continue
                name = f"{policy} {share:.3f}" + ("" if bits is None else f" + {bits} bits, window {window}")
                fixed = lambda make=make, share=share: make(share)  # noqa: E731
                found[name] = {"make": fixed, "bytes_ratio": ratio(fixed)}
    return found


def largest(fits) -> float | None:
    """The largest ratio that fits, to 1 in 100; None where none does."""
    low, high = 0.035, 1.0
    if not fits(low):
        return None
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return round(low, 3)


def score(options, model, tokenizer, work: Path) -> None:
    """Scores of all caches on every text, one line each."""
    lines = work / "scores.jsonl"
    known = {(row["text"], row["cache"]) for row in read_lines(lines)}
    prose = prose_texts(tokenizer, documents(options.valid), options.context, 96, options.texts)
    needles = needle_texts(tokenizer, options.context, options.needles, UNSEEN)
    # alternating, so that a part of a run has both
    order = [text for pair in zip(prose, [*needles, *[None] * len(prose)]) for text in pair if text is not None]
    caches = None
    for i, text in enumerate(order):
        probe = Probe(model, text)
        if caches is None:
            caches = uniform_caches(options, model, probe, work / "shares.json")
            for goal in options.goals:
                config = KVCacheConfig.load(config_of(work, goal))
                caches[f"tuned {goal}"] = {"make": lambda config=config: config.build(model.config)}
                size = probe.filled(config.build(model.config)).nbytes
                caches[f"tuned {goal}"]["bytes_ratio"] = size / probe.nbytes
        with lines.open("a") as file:
            for name, cache in caches.items():
                if (i, name) not in known:
                    found = asdict(probe.score(probe.filled(cache["make"]())))
                    row = {"text": i, "kind": text.kind, "cache": name, "bytes_ratio": cache["bytes_ratio"], **found}
                    file.write(json.dumps(row | {"dense_nll": probe.dense.nll, "dense_hits": probe.dense.hits}) + "\n")
                    file.flush()
        print(f"text {i + 1} of {len(order)}", flush=True)


def read_lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def summary(options, model, work: Path) -> dict:
    """Means of every cache, and differences to the tuned one of each goal on the same texts."""
    by_cache: dict[str, dict[int, dict]] = {}
    for row in read_lines(work / "scores.jsonl"):
        by_cache.setdefault(row["cache"], {})[row["text"]] = row
    rows = [row | {"cache": name} for name, row in ((name, means(found)) for name, found in by_cache.items())]
    goals = {}
    for goal in options.goals:
        tuned = by_cache[f"tuned {goal}"]
        rivals = {}
        for name, found in by_cache.items():
            size = next(iter(found.values()))["bytes_ratio"]
            # what is of about these bytes, or of fewer and yet a rival
            if not name.startswith("tuned") and 0.7 * goal <= size <= 1.06 * goal:
                rivals[name] = {"bytes_ratio": round(size, 4)} | {
                    kind: against(tuned, found, kind) for kind in ("text", "needle")
                }
        goals[str(goal)] = {"tuned": means(tuned), "rivals": rivals}
    return {
        "environment": environment(),
        "model": options.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "context": options.context,
        "goals": goals,
        "rows": rows,
    }


def against(tuned: dict, found: dict, kind: str) -> dict:
    """KL of a rival minus that of the tuned cache, on the same texts: above 0 where the tuned one is better."""
    both = [i for i in tuned if i in found and tuned[i]["kind"] == kind]
    if not both:
        return {}
    one = bootstrapped([found[i]["kl"] - tuned[i]["kl"] for i in both])
    hits = difference_of([found[i]["hits"] for i in both], [tuned[i]["hits"] for i in both])
    return {"kl": rounded(one), "hits": rounded(hits)}


def means(found: dict[int, dict]) -> dict:
    row = {"bytes_ratio": round(next(iter(found.values()))["bytes_ratio"], 4)}
    for kind in ("text", "needle"):
        own = [one for one in found.values() if one["kind"] == kind]
        if own:
            row[kind] = {"kl": rounded(bootstrapped([one["kl"] for one in own]))}
            row[kind]["hits"] = rounded(mean_of([one["hits"] for one in own]))
            row[kind]["nll"] = round(sum(one["nll"] for one in own) / len(own), 4)
            row[kind]["dense_nll"] = round(sum(one["dense_nll"] for one in own) / len(own), 4)
            row[kind]["n"] = len(own)
    if "text" in row:
        row["text"]["perplexity"] = round(math.exp(row["text"]["nll"]), 3)
    return row


def rounded(estimate) -> list:
    return [None if x is None else round(x, 4) for x in (estimate.mean, estimate.low, estimate.high)]


if __name__ == "__main__":
    main()
