"""Prompts longer than memory: fed to the model chunk by chunk, evicted from in between."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_kvcache.compat import cache_argument

CHUNK = 1024


@torch.no_grad()
def prefill(
    model,
    input_ids: torch.Tensor,
    cache,
    *,
    attention_mask: torch.Tensor | None = None,
    chunk: int | None = None,
    request: torch.Tensor | None = None,
    advance: Callable[[int], None] = lambda n_tokens: None,
) -> None:
    """Fill a cache with a prompt, all but its last token; `model.generate(input_ids, cache=cache)` goes on.

    Attention reads at most what the cache keeps and one chunk, and no logits are computed, so peak memory depends on
    budget and chunk, not on the length of the prompt. What the cache holds already is not fed again: a second turn
    passes the whole conversation.

    Args:
        model: causal language model, or its decoder.
        input_ids: `[B, T]`.
        cache: any cache; a `LocretCache` evicts as the paper does: all but its `local` last tokens in chunks.
        attention_mask: `[B, T]`, zeros for left padding.
        chunk: tokens fed at a time; None means that of the cache, or 1,024.
        request: ids `[n]` that ask for the repetition of the context, such as those of "Repeat the previous context
            exactly.", for a policy that reads a prompt twice (KVzip); None lets it follow without a word.
        advance: called with the number of tokens after each chunk.

    Raises:
        ValueError: the cache holds as many tokens as the prompt already, or a chunk is smaller than one token.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(model, "base_model", model)
    chunk = getattr(cache, "chunk", CHUNK) if chunk is None else chunk
    start, stop = cache.get_seq_length(), input_ids.shape[1] - 1
    if start > stop:
        raise ValueError(f"the cache holds {start} tokens already, the prompt has {input_ids.shape[1]}")
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least one token")
    if request is not None and not reads_twice(cache):
        raise ValueError("request= asks for the repetition of a prompt, and this cache does not read it twice")
    policy = getattr(cache, "policy", None)
    # the tail is fed once the rest is final: see `Locret`
    tail = max(stop - policy.n_recent, start) if policy is not None and policy.defer_prefill_eviction else stop
    cuts = [*range(start, tail, chunk), *range(tail, stop, chunk), stop]
    try:
        for first, last in zip(cuts, cuts[1:]):
            cache.prompt_incomplete = last < tail
            options = {}
            if attention_mask is not None:
                positions = (attention_mask[:, :last].cumsum(-1) - 1).clamp(min=0)
                options = {"attention_mask": attention_mask[:, :last], "position_ids": positions[:, first:]}
            decoder(input_ids[:, first:last], **cache_argument(cache), use_cache=True, **options)
            advance(last - first)
        if reads_twice(cache):
            mask = None if attention_mask is None else attention_mask[:, :stop]
            policy.second_pass(decoder, input_ids[:, :stop], cache, mask, request)
    finally:
        cache.prompt_incomplete = None


def reads_twice(cache) -> bool:
    """Whether a cache wants its prompts from `prefill`, because its policy reads them twice."""
    policy = getattr(cache, "policy", None)
    return policy is not None and policy.reads_twice


def begin(model, input_ids: torch.Tensor, cache, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The ids of a prompt `[B, T]` that a forward pass has to be given: the last ones, after `prefill`, where the cache
    `reads_twice`, else all.
    """
    if not reads_twice(cache):
        return input_ids
    prefill(model, input_ids, cache, attention_mask=attention_mask)
    return input_ids[:, -1:]


def query_first(
    input_ids: torch.Tensor,
    n_query: int,
    *,
    attention_mask: torch.Tensor | None = None,
    bos_token_id: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the last `n_query` tokens of a prompt before it, too, so that every token is written knowing the query.

    Retaining heads trained that way (Locret-Q, Huang et al. 2024) score tokens for the query; other policies gain, too.

    Args:
        input_ids: `[B, T]`.
        n_query: tokens of the query, at the end of every row.
        attention_mask: `[B, T]`, zeros for left padding.
        bos_token_id: stays in front where a row begins with it.

    Returns:
        Ids and attention mask `[B, T + n_query]`.

    Raises:
        ValueError: a row has fewer real tokens than that.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    n_real = mask.sum(-1)
    if n_query < 0 or int(n_real.min()) < n_query:
        raise ValueError(f"n_query={n_query} is not between 0 and the {int(n_real.min())} tokens of the shortest row")
    rows = []
    for ids, n in zip(input_ids, n_real.tolist()):
        start = len(ids) - n
        start += int(n > 0 and bos_token_id is not None and int(ids[start]) == bos_token_id)
        rows.append(torch.cat([ids[:start], ids[len(ids) - n_query :], ids[start:]]))
    return torch.stack(rows), torch.cat([mask, mask.new_ones(len(mask), n_query)], 1)
