"""Questions to a model behind a cache, of one text or several at once: tokens are fed, answers decoded greedily."""

from __future__ import annotations

import torch

from hf_kvcache.compat import cache_argument
from hf_kvcache.eval.texts import mask_of


@torch.no_grad()
def feed(model, cache, ids: torch.Tensor, n_padding: torch.Tensor | None = None) -> torch.Tensor:
    """Let a model read tokens into a cache.

    Args:
        model: causal language model in evaluation mode.
        cache: empty, or with what came before.
        ids: `[B, S]`.
        n_padding: tokens of padding that every row begins with, `[B]`, in the cache or in `ids`; None for none.

    Returns:
        Logits `[B, vocab]` of what comes next.
    """
    options = {}
    if n_padding is not None:
        n_seen = cache.get_seq_length()
        mask = mask_of(n_padding, n_seen + ids.shape[1])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, n_seen:]
        options = {"attention_mask": mask, "position_ids": positions}
    return model(ids, **cache_argument(cache), use_cache=True, logits_to_keep=1, **options).logits[:, -1]


def decode(
    model, cache, logits: torch.Tensor, stops: set[int], n_new: int, n_padding: torch.Tensor | None = None
) -> list[list[int]]:
    """The greedy answers, at most `n_new` tokens each and without the token that ends it.

    Rows that have ended are fed on until all have. Of a single row all has been fed to the cache but the last token of
    an answer that was cut off after `n_new`.

    Args:
        model: causal language model in evaluation mode.
        cache: with all that was read.
        logits: `[B, vocab]` after it.
        stops: tokens that end an answer.
        n_new: the most tokens of an answer.
        n_padding: as in `feed`.
    """
    said: list[list[int]] = [[] for _ in logits]
    goes_on = [True] * len(said)
    for step in range(n_new):
        tokens = logits.argmax(-1)
        for row, token in enumerate(tokens.tolist()):
            goes_on[row] &= token not in stops
            if goes_on[row]:
                said[row].append(token)
        if not any(goes_on) or step == n_new - 1:
            break
        logits = feed(model, cache, tokens[:, None], n_padding)
    return said


def stops_of(model, tokenizer) -> set[int]:
    """Tokens that end an answer."""
    found = model.generation_config.eos_token_id
    found = found if isinstance(found, (list, tuple)) else [found]
    return {token for token in (*found, tokenizer.eos_token_id) if token is not None}
