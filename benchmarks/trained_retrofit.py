"""A retrofit of a real model that drops tokens (DMS), fitted to recordings: ratio, perplexity of texts, and needles."""

from __future__ import annotations

import json
import math

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvcache as kv
from hf_kvcache import dmc
from hf_kvcache.cli import main as command
from hf_kvcache.eval.fidelity import build_windows
from hf_kvcache.models import resolve
from hf_kvcache.trainers.dmc_data import load_stream
from hf_kvcache.trainers.fit_decisions import main as fit

# name -> arguments of the trainer; the recordings are those of `trained.py heads`
RUNS = {
    "dms-4x, fitted": ["--ratio", "4", "--window", "64", "--target", "answer_weight"],
    "dms-2x, fitted": ["--ratio", "2", "--window", "64", "--target", "answer_weight"],
}
TASKS = ["niah_single_2", "niah_multikey_1"]
CONTEXT, NEXT, SHOWN = 512, 256, 4


def retrofit(options, rows) -> None:
    for name in options.only or RUNS:
        folder = options.work / "retrofits" / "".join(c if c.isalnum() else "-" for c in name)
        if not (folder / "adapter_config.json").exists():
            recordings = ["--recordings", str(options.work / "rec-answer")]
            fit(["--model", options.model, "--out", str(folder), *recordings, *RUNS[name]])
        report = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        rows.add("retrofit", name, arguments=" ".join(RUNS[name]), **report, **perplexity(options, folder))
        out = options.work / "eval" / folder.name
        asked = ["--model", options.model, "--dtype", "bf16", "--tasks", *TASKS, "--lengths", "1024"]
        asked += ["--instances", str(options.instances), "--settings", "unknown"]
        command(["eval", *asked, "--caches", "dms", "--adapter", str(folder), "--out", str(out)])
        for row in json.loads((out / "eval.json").read_text(encoding="utf-8"))["rows"]:
            score = {key: row["score"][key] for key in ("mean", "low", "high")}
            about = {"bytes": row["bytes_ratio"], "n": row["n_instances"], "answer": row["n_answer"]}
            rows.add("needles", f"{row['task']}, {name}, {row['cache']}", **score, **about)


@torch.no_grad()
def perplexity(options, folder) -> dict:
    """Of whole held-out texts, each token predicted from what its query sees, beside the model that drops nothing."""
    where = resolve(options.model)
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(where)
    kv.attach(model, folder)
    held_out = torch.from_numpy(load_stream(options.data / "valid", tokenizer, SHOWN * (CONTEXT + NEXT))).long()
    losses = {"perplexity": 0.0, "dense perplexity": 0.0}
    windows = build_windows(held_out, CONTEXT, NEXT, SHOWN, tokenizer.bos_token_id)
    for row in windows:
        losses["perplexity"] += _loss(model, row)
        with dmc.compression_off(model):
            losses["dense perplexity"] += _loss(model, row)
    found = {name: math.exp(loss / len(windows)) for name, loss in losses.items()}
    return found | {"change %": 100 * (found["perplexity"] / found["dense perplexity"] - 1)}


def _loss(model, row: torch.Tensor) -> float:
    return cross_entropy(model(row[None], use_cache=False).logits[0, :-1], row[1:]).item()
