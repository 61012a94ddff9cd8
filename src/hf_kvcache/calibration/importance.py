"""What a KV pair is worth, told by the queries that come after it: targets of retaining heads.

Everything is `[B, H, N, D]` after RoPE, computed in float32 and block by block: nothing larger than a block of queries
by a block of keys exists. `-inf` stands for "nothing to learn here": padding, and tokens that no query looks at.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK = (256, 4096)


def answer_max(
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    *,
    q_is_real: torch.Tensor | None = None,
    k_is_real: torch.Tensor | None = None,
    block: tuple[int, int] = BLOCK,
) -> torch.Tensor:
    """Largest score that the answer gives a token of the prompt (Locret, arXiv 2410.01805, causal importance score).

    The maximum over the query heads of a group and the tokens of the answer, before the softmax. The paper's formula
    has no `scaling`, its code does.

    Args:
        q (torch.Tensor):
            queries of the answer, `[B, Hq, A, D]`.
        k (torch.Tensor):
            keys of the prompt, all of them before the answer, `[B, Hkv, T, D]`.
        scaling (float):
            of the attention, `1 / sqrt(D)` as a rule; positive.
        q_is_real, k_is_real (torch.Tensor):
            False for padding, `[B, A]` and `[B, T]`; None when nothing is padded.
        block (tuple[int, int]):
            queries and keys of a block.

    Returns:
        float32 `[B, Hkv, T]`, -inf for padding and where the answer is empty.
    """
    best = k.new_full(k.shape[:3], -torch.inf, dtype=torch.float32)
    for queries, rows in _query_blocks(q, k.shape[1], scaling, block[0]):
        for keys in _slices(k.shape[2], block[1]):
            scores = _scores(rows, k[:, :, keys])
            if q_is_real is not None:
                scores.masked_fill_(~q_is_real[:, None, None, queries, None], -torch.inf)
            best[..., keys] = torch.maximum(best[..., keys], scores.amax((2, 3)))
    return _without_padding(best, k_is_real)


def causal_max(
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    *,
    gap: int = 64,
    is_real: torch.Tensor | None = None,
    block: tuple[int, int] = BLOCK,
) -> torch.Tensor:
    """Largest score that later tokens of the same text give a token: `answer_max` where there is no answer.

    Ours, not the paper's. Nearer queries than `gap` do not count: a token is nearly always looked at by its neighbours.

    Args:
        q (torch.Tensor):
            queries of the text, `[B, Hq, T, D]`.
        k (torch.Tensor):
            keys of the same tokens, `[B, Hkv, T, D]`.
        gap (int):
            token `i` is judged by the tokens from `i + gap` on.
        is_real (torch.Tensor):
            False for padding, `[B, T]`; None when nothing is padded.

    Returns:
        float32 `[B, Hkv, T]`, -inf for padding and for the last `gap` tokens.
    """
    best = k.new_full(k.shape[:3], -torch.inf, dtype=torch.float32)
    for queries, rows in _query_blocks(q, k.shape[1], scaling, block[0]):
        for keys in _slices(min(k.shape[2], max(queries.stop - gap, 0)), block[1]):
            scores = _scores(rows, k[:, :, keys])
            scores.masked_fill_(~_looks(queries, keys, gap, q.device), -torch.inf)
            if is_real is not None:
                scores.masked_fill_(~is_real[:, None, None, queries, None], -torch.inf)
            best[..., keys] = torch.maximum(best[..., keys], scores.amax((2, 3)))
    return _without_padding(best, is_real)


def reconstruction(
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    n_prompt: int,
    *,
    softcap: float | None = None,
    is_real: torch.Tensor | None = None,
    block: tuple[int, int] = BLOCK,
) -> torch.Tensor:
    """Logarithm of the largest attention weight that a repetition of the prompt gives a token of the prompt.

    KVzip (arXiv 2505.23416): the sequence is "prompt, request to repeat it, prompt again", and a KV pair is worth the
    maximum of its weight over the queries of the repetition and the query heads of the group. The logarithm is KVzap's
    (arXiv 2601.07891): weights span many orders of magnitude, of which SmoothL1 would see only the largest. It changes
    no order. The softmax is over all that a query sees (KVzip's own goes over the chunk that is repeated).

    Args:
        q (torch.Tensor):
            queries of the repetition, the last tokens of the sequence, `[B, Hq, R, D]`.
        k (torch.Tensor):
            keys of the whole sequence, `[B, Hkv, N, D]`.
        n_prompt (int):
            `T`: the first columns, which are judged.
        softcap (float):
            of the scores; None where the model has none.
        is_real (torch.Tensor):
            False for padding, `[B, N]`; None when nothing is padded.

    Returns:
        float32 `[B, Hkv, T]`, at most 0; -inf for padding.
    """
    best = k.new_full((*k.shape[:2], n_prompt), -torch.inf, dtype=torch.float32)
    for keys, weights in _log_weights(q, k, scaling, n_prompt, is_real, block, softcap):
        best[..., keys] = torch.maximum(best[..., keys], weights.amax((2, 3)))
    return best


def attention_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    n_prompt: int,
    *,
    is_real: torch.Tensor | None = None,
    block: tuple[int, int] = BLOCK,
) -> torch.Tensor:
    """Attention that the last tokens pay to each token of the prompt: weights summed over queries and heads of a group.

    Arguments as of `reconstruction`. The sum over the tokens that an eviction keeps, over the sum of all, is how much
    of what a model looks at is left.

    Returns:
        float32 `[B, Hkv, T]`.
    """
    total = k.new_zeros((*k.shape[:2], n_prompt), dtype=torch.float32)
    for keys, weights in _log_weights(q, k, scaling, n_prompt, is_real, block):
        total[..., keys] += weights.exp().sum((2, 3))
    return total


def _log_weights(q, k, scaling, n_prompt, is_real, block, softcap=None) -> Iterator[tuple[slice, torch.Tensor]]:
    """Log attention weights of the prompt's keys `[B, Hkv, G, <= r, <= c]`, block by block, and which keys."""
    first = k.shape[2] - q.shape[2]
    for queries, rows in _query_blocks(q, k.shape[1], scaling, block[0]):
        places = slice(first + queries.start, first + queries.stop)

        def seen(keys, rows=rows, places=places):
            scores = _scores(rows, k[:, :, keys])
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if keys.stop > places.start:
                scores.masked_fill_(~_looks(places, keys, 0, q.device), -torch.inf)
            if is_real is not None:
                scores.masked_fill_(~is_real[:, None, None, None, keys], -torch.inf)
            return scores

        # what fits into one block is held
        whole = seen(slice(0, places.stop)) if places.stop <= block[1] else None
        parts = [whole] if whole is not None else map(seen, _slices(places.stop, block[1]))
        parts = [part.logsumexp(-1, keepdim=True) for part in parts]
        total = torch.cat(parts, -1).logsumexp(-1, keepdim=True)  # [B, Hkv, G, r, 1]
        if is_real is not None:
            # what a padded query looks at counts nowhere
            total = total.masked_fill(~is_real[:, None, None, places, None], torch.inf)
        if whole is not None:
            yield slice(0, n_prompt), whole[..., :n_prompt] - total
            continue
        for keys in _slices(n_prompt, block[1]):
            yield keys, seen(keys) - total


def _query_blocks(q, n_kv_heads: int, scaling: float, size: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Which queries, and their rows `[B, Hkv, G, <= size, D]` in float32, scaled."""
    groups = q.unflatten(1, (n_kv_heads, -1))
    for queries in _slices(q.shape[2], size):
        yield queries, groups[:, :, :, queries].float() * scaling


def _scores(rows: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Products `[B, Hkv, G, r, c]` in float32, whatever the mode around."""
    with torch.autocast(k.device.type, enabled=False):
        return (rows.flatten(2, 3) @ k.float().mT).unflatten(2, rows.shape[2:4])


def _looks(queries: slice, keys: slice, gap: int, device) -> torch.Tensor:
    """Whether a key is at least `gap` tokens before a query: boolean `[r, c]`."""
    rows, columns = (torch.arange(s.start, s.stop, device=device) for s in (queries, keys))
    return columns + gap <= rows.unsqueeze(1)


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _without_padding(scores: torch.Tensor, is_real: torch.Tensor | None) -> torch.Tensor:
    return scores if is_real is None else scores.masked_fill(~is_real.unsqueeze(1), -torch.inf)
