"""What rows are worth that a model chooses itself: one-hop recall with filler, trained and served in minutes.

All models start from the same one and are trained for the same steps; policies without training get the control's
weights and the number of rows that DMC came to.
"""

from __future__ import annotations

import time
from functools import partial

import torch

import hf_kvcache as kv
from hf_kvcache.dmc import recall as task
from hf_kvcache.dmc import retrofits

SEED, TEXTS = 0, 256
# (name, tokens per row asked for): what is asked counts condemned tokens as gone, which DMS still holds for a window
ASKED = (("dmc", 4.0), ("dmc", 8.0), ("dms", 4.3))
CACHES = {"dmc": kv.DMCCache, "dms": kv.DMSCache}
NOTHING_PROTECTED = {"n_sink": 0, "n_recent": 0}
POLICIES = {
    "window and 4 sinks": partial(kv.EvictionCache, "streaming", n_sink=4, n_recent=0, interval=1),
    "TOVA": partial(kv.EvictionCache, "tova", **NOTHING_PROTECTED, interval=1),
    "H2O": partial(kv.EvictionCache, "h2o", **NOTHING_PROTECTED, interval=1),
}


def recall(options) -> list[dict]:
    """Answers found by cache and training, with the tokens per row that it really came to."""
    plan, seed = getattr(options, "plan", task.Plan()), getattr(options, "seed", SEED)
    texts = task.sample(TEXTS, torch.Generator().manual_seed(99))
    base, seconds = _timed(partial(task.train_base, plan, seed))
    rows = [_row("the model before", base, kv.KVCache(), texts, seconds)]
    control, seconds = _timed(partial(task.train_on, base, plan, seed))
    rows.append(_row("control: trained on", control, kv.KVCache(), texts, seconds))
    learned = []
    for method, asked in ASKED:
        model, seconds = _timed(partial(task.train_on, base, plan, seed, asked, task.SETTINGS[method]))
        cache = CACHES[method]()
        learned.append(_row(method.upper(), model, cache, texts, seconds, asked))
    pooled, seconds = _timed(partial(task.train_pooling, base, plan, seed))
    for name, make in POLICIES.items():
        cache = make(ratio=1 / learned[0]["tokens per row"])
        rows.append(_row(name, control, cache, texts, 0.0))
    rows += [_row("fixed pooling of 4", pooled, kv.DMCCache(), texts, seconds), *learned]
    return [row | {"seed": seed} for row in rows]


def _timed(train):
    started = time.process_time()
    return train(), time.process_time() - started


@torch.no_grad()
def _row(name, model, cache, texts, seconds, asked=None) -> dict:
    said = task.serve(model, texts, cache)
    row = {
        "rows": name,
        "asked": asked,
        "nominal": None,
        "tokens per row": task.tokens_per_row(cache),
        "accuracy": task.accuracy(said, texts),
        "fillers kept": None,
        "pairs kept": None,
        "CPU seconds of training": round(seconds, 1),
    }
    if retrofits(model):
        together = task.logits(model, texts)
        assert torch.allclose(said, together, atol=1e-3), f"{name}: token by token is not what is read at once"
        found = task.verdict(model, texts)
        row |= {"nominal": found.ratio, "fillers kept": _shares(found.fillers), "pairs kept": _shares(found.pairs)}
    return row


def _shares(kept: torch.Tensor) -> str:
    """Shares of every head, layers apart."""
    return " | ".join(" ".join(f"{share:.2f}" for share in layer) for layer in kept.tolist())
