"""Time and bytes of one greedy generation behind a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

from hf_kvcache.compat import cache_argument
from hf_kvcache.eval.memory import cache_nbytes
from hf_kvcache.long_prompts import begin


@dataclass(frozen=True)
class Round:
    """One generation.

    Attributes:
        prefill_s: seconds until the first token, compression of the prompt included.
        step_s: seconds of every further token.
        nbytes_prompt: bytes of the cache after the prompt.
        nbytes: bytes of the cache at the end.
    """

    prefill_s: float
    step_s: list[float]
    nbytes_prompt: int
    nbytes: int


@torch.no_grad()
def generate_once(model, prompt: torch.Tensor, make_cache: Callable, n_new: int) -> Round:
    """Prefill `prompt` `[B, T]`, then decode `n_new` tokens greedily, each timed by itself."""
    cache = make_cache()
    fed, times = prompt, []
    nbytes_prompt = 0
    for _ in range(n_new + 1):
        _wait(prompt.device)
        started = perf_counter()
        fed = begin(model, prompt, cache) if not times else fed
        logits = model(fed, **cache_argument(cache), use_cache=True, logits_to_keep=1).logits
        fed = logits[:, -1:].argmax(-1)  # [B, 1]
        _wait(prompt.device)
        times.append(perf_counter() - started)
        nbytes_prompt = nbytes_prompt or cache_nbytes(cache)
    return Round(times[0], times[1:], nbytes_prompt, cache_nbytes(cache))


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
