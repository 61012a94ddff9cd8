"""Questions to a model behind a cache: tokens are fed, answers are decoded greedily."""

from __future__ import annotations

import torch

from hf_kvcache.compat import cache_argument


@torch.no_grad()
def feed(model, cache, ids: list[int]) -> torch.Tensor:
    """Let a model read tokens into a cache; returns the logits `[vocab]` of what comes next."""
    fed = torch.tensor([ids], device=model.device)
    return model(fed, **cache_argument(cache), use_cache=True, logits_to_keep=1).logits[0, -1]


def decode(model, cache, logits: torch.Tensor, stops: set[int], n_new: int) -> list[int]:
    """The greedy answer, at most `n_new` tokens and without the token that ends it.

    All of it has been fed to the cache, but the last token of an answer that was cut off after `n_new`.
    """
    said = []
    while (token := int(logits.argmax())) not in stops:
        said.append(token)
        if len(said) == n_new:
            break
        logits = feed(model, cache, [token])
    return said


def stops_of(model, tokenizer) -> set[int]:
    """Tokens that end an answer."""
    found = model.generation_config.eos_token_id
    found = found if isinstance(found, (list, tuple)) else [found]
    return {token for token in (*found, tokenizer.eos_token_id) if token is not None}
