"""Samples of a text."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def token_batches(ids: torch.Tensor, length: int, n_samples: int) -> Iterator[torch.Tensor]:
    """Windows `[1, length]` of a text `[n]`, evenly spread: `n_samples`, or as many as fit side by side.

    Raises:
        ValueError: the text is shorter than one window.
    """
    surplus = len(ids) - length
    if surplus < 0:
        raise ValueError(f"the text has {len(ids)} tokens, one sample needs {length}; give a longer text")
    for start in torch.linspace(0, surplus, min(n_samples, len(ids) // length)).long():
        yield ids[start : start + length].unsqueeze(0)
