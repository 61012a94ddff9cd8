"""Attention weights as policies see them: how much of the softmax each kept row gets from some queries."""

from __future__ import annotations

import torch

from hf_kvcache.kernels import forced_backend
from hf_kvcache.kernels.row_weights import row_weights

QUERIES = 256  # queries that are scored at a time, at most
ROWS = 1024  # rows that are read at a time
IN_CACHE = 1 << 20  # scores that stay close to a core of a CPU while they are turned into weights: half the time


def newest_mass(view, n_queries: int) -> torch.Tensor:
    """`attention_mass` of the newest `n_queries` queries of the layer (fewer, if it has seen fewer)."""
    queries = view.queries(n_queries)
    return attention_mass(queries, view.tokens_seen - queries.shape[3], view)


def queries_at_once(n_heads: int, n_rows: int, device: torch.device) -> int:
    """How many queries of so many heads are scored together against so many rows; `n_heads` is of the whole batch."""
    if device.type != "cpu":
        return QUERIES
    return min(max(IN_CACHE // (n_heads * n_rows), 8), QUERIES)


def in_one_pass(queries: torch.Tensor) -> bool:
    """Whether `row_weights` has a kernel where these queries are, so that its rows should be dense."""
    return queries.device.type == "cpu" and forced_backend() != "triton"


def attention_mass(queries: torch.Tensor, first: int, view) -> torch.Tensor:
    """What each kept row gets of the attention of some queries, summed over them, meaned over the heads of a group.

    Weights are those of the softmax over the rows that are kept now. Dense rows on a CPU are read once (`row_weights`),
    many others block by block, twice, so that no tensor of all queries and all rows is ever made.

    Args:
        queries: after RoPE, `[B, Hkv, G, S, D]`.
        first: logical position of the first of them; they stand one after another.
        view: the `KVView` of the layer.

    Returns:
        float32 `[B, Hkv, N]` in view order. Queries that are padding, and rows that are, count nothing.
    """
    positions = view.positions  # [B, Hkv, N]
    # pads stand in front: a query before the first real token of its row is one
    start = torch.where(positions >= 0, positions, view.tokens_seen).amin(-1)  # [B, Hkv]
    where = torch.arange(first, first + queries.shape[3], device=positions.device)
    is_real = where >= start.unsqueeze(-1)  # [B, Hkv, S]
    store = view.layer.store
    if in_one_pass(queries) and not store.n_packed:
        knobs = {"scaling": view.scaling, "softcap": view.softcap, "q_is_real": is_real}
        return row_weights(queries.flatten(1, 2), store.dense["k"], positions, first, **knobs)
    mass = torch.zeros(positions.shape, dtype=torch.float32, device=positions.device)
    at_once = queries_at_once(queries.shape[:3].numel(), min(positions.shape[2], ROWS), positions.device)
    for at in range(0, queries.shape[3], at_once):
        part = queries[:, :, :, at : at + at_once].float() * view.scaling
        total, (first_pass, second_pass) = None, _twice(part, first + at, view)
        for _, scores in first_pass:
            block = scores.logsumexp(-1, keepdim=True)  # [B, Hkv, G, S, 1]
            total = block if total is None else torch.logaddexp(total, block)
        # a query that sees nothing has no weights to give
        total = total.masked_fill(total == float("-inf"), float("inf"))
        for rows, scores in second_pass:
            weights = (scores - total).exp() * is_real[:, :, None, at : at + at_once, None]
            mass[:, :, rows] += weights.sum(3).mean(2)
    return mass


def _twice(queries, first, view):
    """`_scores` for two passes; those of few rows are held in between."""
    if view.n_kept <= ROWS:
        held = list(_scores(queries, first, view))
        return held, held
    return _scores(queries, first, view), _scores(queries, first, view)


def _scores(queries, first, view):
    """Masked scores `[B, Hkv, G, S, n]` of one block of rows after another, of queries at positions from `first` on."""
    end = first + queries.shape[3]
    where = torch.arange(first, end, device=queries.device).view(-1, 1)
    start, is_whole = 0, view.n_kept == view.tokens_seen and not view.layer.store.n_packed
    for k in view.key_blocks(ROWS):
        rows = slice(start, start + k.shape[2])
        start = rows.stop
        # while nothing has gone, rows stand in the order of the text: what comes after all queries is not looked at
        if is_whole and rows.start >= end:
            return
        scores = torch.einsum("bhgsd,bhnd->bhgsn", queries, k.float())
        if view.softcap is not None:
            scores = torch.tanh(scores / view.softcap) * view.softcap
        positions = view.positions[:, :, rows].unsqueeze(2)  # [B, Hkv, 1, n]
        is_visible = (positions >= 0) & (positions <= where)  # [B, Hkv, S, n]
        yield rows, scores.masked_fill(~is_visible.unsqueeze(2), float("-inf"))
