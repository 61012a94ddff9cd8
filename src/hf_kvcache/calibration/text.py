"""Samples of a text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from hf_kvcache.calibration.facts import Facts


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


def mixed_batches(
    tokenizer, ids: torch.Tensor, length: int, n_samples: int, prose_share: float = 0.5, seed: int = 0
) -> list[torch.Tensor]:
    """Samples of prose, and samples in which facts are hidden and asked for, in an order drawn by lot.

    Prose alone shows little of the directions by which a model finds something again.

    Args:
        tokenizer: of the model.
        ids: the text `[n]`, at its end token cut into documents.
        length: tokens of a sample.
        n_samples: how many of both kinds; fewer where fewer of prose fit side by side, whose share stays.
        prose_share: share of them that is prose alone.
        seed: of the facts and of the order.

    Raises:
        ValueError: the text is shorter than a sample, or has too few words to name facts by.
    """
    n_prose = round(n_samples * prose_share)
    found = list(token_batches(ids, length, n_prose)) if n_prose else []
    n_facts = n_samples - n_prose
    if len(found) < n_prose:
        n_facts = round(n_facts * len(found) / n_prose)
    rng = np.random.default_rng(seed)
    if n_facts:
        # what ends a text would end a turn
        facts = Facts(tokenizer, ids[ids != tokenizer.eos_token_id].numpy())
        found += [facts.sequence(length, rng).ids.unsqueeze(0) for _ in range(n_facts)]
    return [found[i] for i in rng.permutation(len(found))]
