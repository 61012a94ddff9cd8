"""What becomes of a family under a cache: run it, and say it in a word."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import pixels
import torch
import zoo
from families import FAMILIES, NEED_CONFIG
from transformers import AttentionInterface, AutoModelForImageTextToText, LogitsProcessor

import hf_kvcache as kv
from hf_kvcache import compat

# of 120 tokens 96 are packed, or 88 evicted; latents of full rank are lossless but for rounding
CACHES: dict[str, Callable[..., kv.KVCache]] = {
    "lossless": kv.KVCache,
    "8 bits": lambda **more: kv.QuantCache(8, window=16, **more),
    "sparse": lambda **more: kv.SparseCache(0.5, window=16, n_sink=2, **more),
    "low rank": lambda **more: kv.LowRankCache(1.0, window=16, n_sink=2, **more),
    "evicting": lambda **more: kv.EvictionCache("keydiff", budget=32, n_sink=2, n_recent=8, interval=4, **more),
}
ATTENTIONS = ("stock", "hf_kvcache")

# what a refusal tells the user to do: done, it has to help
ADVICE = {
    "config": (re.compile(r"config=model\.config"), lambda model: dict(config=model.config)),
    "post": (re.compile(r'rope="post"'), lambda model: dict(rope="post")),
}

# what a refusal that is final has to name: another implementation, another cache, or that the model brings its own
ACTIONABLE = re.compile(r"attn_implementation|without|use |cache of its own")

# largest difference of the first logits that read what the cache has made of the prompt, in standard deviations
NEAR = {"lossless": 1e-3, "8 bits": 0.3, "low rank": 1e-2}


class Run(NamedTuple):
    """Tokens `[B, T]`, logits `[n, B, vocabulary]`, and the cache they went through (None: transformers' own)."""

    tokens: torch.Tensor
    logits: torch.Tensor
    cache: kv.KVCache | None


class Refused(Exception):
    """A clear no before the first token."""


class _Counter(LogitsProcessor):
    n_tokens = 0

    def __call__(self, input_ids, scores):
        self.n_tokens += 1
        return scores


@cache
def model_of(family: str):
    """The shared tiny model of a family, text or with pixels, and what it reads."""
    if family in pixels.CONFIGS:
        torch.manual_seed(0)
        model = zoo.sharpened(AutoModelForImageTextToText.from_config(pixels.config_of(family)))
        return model, pixels.inputs_of(family), model.config._attn_implementation
    model, ids = zoo.tiny_model(family), zoo.prompt()
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    return model, inputs, model.config._attn_implementation


def all_families() -> list[str]:
    """Text models, then models with pixels."""
    return sorted(FAMILIES) + list(pixels.CONFIGS)


@cache
def reference(family: str) -> Run:
    """What the model says without our cache and our attention."""
    with untouched():
        return _generate(family, "stock", None)


@contextmanager
def untouched():
    """transformers' attention functions as they are where this library has never been used."""
    registry = AttentionInterface._global_mapping
    ours = dict(registry)
    registry.pop("eager", None)
    registry["sdpa"] = compat.sdpa_attention_forward
    try:
        yield
    finally:
        registry.clear()
        registry.update(ours)


def sensitivity(family: str) -> float:
    """How much the first logits change, in standard deviations, when tokens 30 to 69 of 120 are others."""
    model, inputs, _ = model_of(family)
    ids = inputs["input_ids"].clone()
    ids[:, 30:70] = zoo.prompt(seed=5)[:, 30:70]
    with torch.no_grad():
        one, other = (model(**inputs | {"input_ids": text}).logits[:, -1] for text in (inputs["input_ids"], ids))
    return _distance(other, one)


def _generate(family: str, attention: str, cache) -> Run:
    model, inputs, stock = model_of(family)
    model.set_attn_implementation(stock if attention == "stock" else attention)
    counter = _Counter()
    given = {} if cache is None else compat.cache_argument(cache)
    try:
        out = model.generate(
            **inputs,
            **given,
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            logits_processor=[counter],
        )
    except (ValueError, NotImplementedError, AttributeError) as error:
        # that a layer lacks something is an AttributeError, which can say what to do, too
        is_clear = not isinstance(error, AttributeError) or ADVICE["config"][0].search(str(error))
        if cache is None or counter.n_tokens or not is_clear:
            raise
        raise Refused(str(error)) from error
    finally:
        model.set_attn_implementation(stock)
    return Run(out.sequences, torch.stack(out.logits), cache)


@cache
def _run(family: str, attention: str, name: str) -> tuple[Run | Exception, tuple[str, ...]]:
    """The run, or what it raised, and the advice that was followed."""
    model, *_ = model_of(family)
    more, followed = ({"config": model.config}, ("config",)) if family in NEED_CONFIG else ({}, ())
    while True:
        try:
            return _generate(family, attention, CACHES[name](**more)), followed
        except Refused as refusal:
            advice = next((key for key, (said, _) in ADVICE.items() if said.search(str(refusal))), None)
            if advice is None or advice in followed:
                return refusal, followed
            followed += (advice,)
            more |= ADVICE[advice][1](model)
        except Exception as error:
            return error, followed


def outcome(family: str, attention: str, name: str) -> str:
    """What became of it, in a word, and after a comma the advice that had to be followed.

    "exact": the same tokens and logits; "packs" and "evicts": it really does, and logits are as near as they should be;
    "stock": every layer is transformers' own, so nothing is compressed; "refused": before the first token, with a
    message that says what to do. Everything else is an error and begins with "WRONG".
    """
    run, followed = _run(family, attention, name)
    if isinstance(run, Run):
        word = _judge(run, family, attention, name)
    elif not isinstance(run, Refused):
        word = f"WRONG: {type(run).__name__}: {run}"
    else:
        word = "refused" if ACTIONABLE.search(str(run)) else f"WRONG: refused without saying what to do: {run}"
    return ", ".join([word, *followed])


def _judge(run: Run, family: str, attention: str, name: str) -> str:
    dense = reference(family)
    if not run.logits.isfinite().all():
        return "WRONG: logits that are not finite"
    if (far := _distance(run.logits[0], dense.logits[0])) > NEAR["lossless"]:
        return f"WRONG: the prompt's own logits differ by {far:.1e}"
    ours = [layer for layer in run.cache.layers if isinstance(layer, kv.KVLayer) and layer.tokens_seen]
    if name == "lossless" or not ours:
        if not torch.equal(run.tokens, dense.tokens):
            return "WRONG: other tokens"
        if (far := _distance(run.logits, dense.logits)) > NEAR["lossless"]:
            return f"WRONG: logits differ by {far:.1e}"
        return "exact" if ours else "stock"
    # the same token has been read by both
    if (far := _distance(run.logits[1], dense.logits[1])) > NEAR.get(name, float("inf")):
        return f"WRONG: logits differ by {far:.1e}"
    if attention != "stock":
        other, _ = _run(family, "stock", name)
        if isinstance(other, Run) and (far := _distance(run.logits[1], other.logits[1])) > NEAR["lossless"]:
            return f"WRONG: logits differ by {far:.1e} from those of the stock attention"
    if name == "evicting":
        return "evicts" if all(layer.store.n_kept < layer.tokens_seen for layer in ours) else "WRONG: evicts nothing"
    if not all(layer.store.n_packed for layer in ours):
        return "WRONG: packs nothing"
    # bases that are fitted to the prompt take more than they save on so few tokens
    if name != "low rank" and sum(layer.nbytes for layer in ours) >= sum(layer.nbytes_dense for layer in ours):
        return "WRONG: more bytes than dense"
    return "packs"


def _distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return ((logits - reference).abs().max() / reference.std()).item()
