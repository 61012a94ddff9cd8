"""How fast a model decodes behind a cache."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch

from hf_kvcache.compat import cache_argument
from hf_kvcache.tuning.probes import Probe

WARM_UP, STEPS = 4, 24


@torch.no_grad()
def decode_rate(probe: Probe, cache) -> float:
    """Tokens per second of greedy decoding for one text, from the median step.

    Args:
        probe: a text that was read.
        cache: empty; it reads the text and is decoded from.
    """
    fed = torch.tensor([probe.text.follow[:1]], device=probe.model.device)
    cache, times = probe.filled(cache), []
    for _ in range(WARM_UP + STEPS):
        started = perf_counter()
        logits = probe.model(fed, **cache_argument(cache), use_cache=True, logits_to_keep=1).logits
        # asking for the token waits for a device
        fed = torch.tensor([[logits[0, -1].argmax().item()]], device=fed.device)
        times.append(perf_counter() - started)
    return 1 / median(times[WARM_UP:])
