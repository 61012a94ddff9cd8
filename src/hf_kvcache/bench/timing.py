"""Several contestants timed in turn, so that a drifting machine is unfair to none."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

# a contestant this many times slower than the fastest is timed a few times only
SLOW, FEW = 20, 3


def interleaved(contestants: dict[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, dict]:
    """Call every contestant once per round, after one warm-up round; very slow ones sit out the later rounds.

    Args:
        contestants: name -> the call to time.
        rounds: timed calls of each.
        device: "cuda" waits for the GPU around every call.

    Returns:
        For every name the median, the fastest and the slowest call in milliseconds.
    """
    for call in contestants.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        fastest = min((min(t) for t in times.values() if t), default=0.0)
        for name, call in contestants.items():
            if turn < FEW or median(times[name]) < SLOW * fastest:
                times[name].append(timed(call, device))
    return {name: {"ms": median(t), "min": min(t), "max": max(t)} for name, t in times.items()}


def timed(call: Callable[[], object], device: str = "cpu") -> float:
    """Milliseconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3
