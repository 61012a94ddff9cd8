"""Attention where the model decides how long a row is seen: DMC and DMS, in training and in inference."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hf_kvcache import compat
from hf_kvcache.attention.call import AttentionCall, as_tensor, unserved
from hf_kvcache.attention.exact import over_tensors
from hf_kvcache.attention.mask import as_boolean
from hf_kvcache.attention.row_sides import sides_as_sparse_rows
from hf_kvcache.dmc import flex
from hf_kvcache.dmc.masks import expiry, hiding_bias
from hf_kvcache.kernels.dense_attention import dense_attention
from hf_kvcache.kernels.ragged_attention import ragged_attention

BLOCK = 256  # queries that share the rows gathered for them


def attend_trained(call: AttentionCall, retrofit) -> torch.Tensor:
    """Attend over what a `TrainedLayer` holds: pages for one token, a chunk with what is held for many.

    Args:
        call: over a view of the layer.
        retrofit: of the attention module.

    Returns:
        `[B, Hq, S, D]`.

    Raises:
        ValueError: the model asks attention for something else, too.
    """
    view, layer, store = call.view, call.view.layer, call.view.layer.store
    q, scaling, softcap = call.query, call.scaling, call.softcap
    refuse_unfused(layer.layer_idx, call.fuses, call.options)
    if retrofit.settings.clears_queries:
        q = without_channel(call.module, q, retrofit)
    if call.n_new == 1:
        layer.place(view)
        if not store.packed.n_tokens:
            # padding, in every row so far
            return torch.zeros_like(q)
        keys, values = sides_as_sparse_rows(store)
        pages = store.packed.table, store.packed.lengths
        out, _ = ragged_attention(store.keys.project_query(q), keys, values, *pages, scaling=scaling, softcap=softcap)
        return store.values.project_output(out).to(q.dtype)
    start = layer.tokens_seen - call.n_new
    position = torch.arange(start, layer.tokens_seen, dtype=torch.int32, device=q.device)
    k, v, until, where = view.new_k, view.new_v, layer.seen_until, position
    if layer.cached_rows is not None:
        old_k, old_v, old_until = layer.cached_rows
        k, v, until = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2), torch.cat([old_until, until], 2)
        # whatever is held is older than the new tokens
        where = torch.cat([position.new_full((old_k.shape[2],), -1), position])
    return attend_until(q, k, v, where, until, position, scaling=scaling, softcap=softcap)


def attend_until(q, k, v, position, seen_until, q_position, *, scaling, softcap=None, block=BLOCK) -> torch.Tensor:
    """Causal attention over rows that are seen up to a position each: exact, and without a mask of `S * N`.

    Queries go block by block over the rows that one of them sees, gathered per head, so that work shrinks with what
    the model lets go.

    Args:
        q: `[B, Hq, S, D]`.
        k, v: `[B, Hkv, N, D]`, in the order of their positions.
        position: of the rows, `[N]`.
        seen_until: int32 `[B, Hkv, N]`; -1 for what nobody sees.
        q_position: of the queries, ascending `[S]`.
        scaling, softcap: of the scores.
        block: queries at a time.

    Returns:
        `[B, Hq, S, D]`; zero for a query that sees nothing.
    """
    out = torch.empty_like(q)
    for first in range(0, q.shape[2], block):
        at = slice(first, first + block)
        now = q_position[at]
        n = int((position <= now[-1]).sum())
        is_seen = seen_until[..., :n] >= now[0]
        k_now, v_now, until, where = _gather(is_seen, k, v, seen_until[..., :n], position[:n])
        mask = (where.unsqueeze(-2) <= now.view(-1, 1)) & (until.unsqueeze(-2) >= now.view(-1, 1))
        out[:, :, at] = _masked(q[:, :, at], k_now, v_now, mask, scaling, softcap)
    return out


def _gather(is_seen, k, v, until, position):
    """The rows that are seen, per head, in their order, padded to the longest."""
    most = int(is_seen.sum(-1).max()) if is_seen.numel() else 0
    where = position.expand_as(until)
    if most > 0.8 * is_seen.shape[-1]:
        return k[:, :, : is_seen.shape[-1]], v[:, :, : is_seen.shape[-1]], until, where
    index = (~is_seen).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
    rows = index.unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
    # a head with fewer seen rows is padded with others, which have expired for every query
    return k.gather(2, rows), v.gather(2, rows), until.gather(2, index), where.gather(2, index)


def _masked(q, k, v, mask, scaling, softcap):
    """Attention under a boolean mask `[B, Hkv, S, n]`; zero where a query sees nothing."""
    B, Hq, S, D = q.shape
    Hkv = k.shape[1]
    if softcap is not None:
        return dense_attention(q, k.contiguous(), v.contiguous(), scaling=scaling, mask=mask, softcap=softcap)[0]
    mask = mask.unsqueeze(2).expand(-1, -1, Hq // Hkv, -1, -1).reshape(B, Hq, S, -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=Hq != Hkv)
    return out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def attend_text(retrofit, module, query, key, value, mask, base, fuses, options):
    """A retrofitted model without a cache: training, and evaluation of whole texts.

    Args:
        retrofit: of the attention module.
        other arguments: see `AttentionCall`.

    Returns:
        The output `[B, T, Hq, D]`, and no attention weights.

    Raises:
        ValueError: this is no text from its beginning, or several in one row.
    """
    if not retrofit.compresses:
        query = without_channel(module, query, retrofit) if retrofit.settings.clears_queries else query
        return over_tensors(base, module, query, key, value, mask, options)
    refuse_unfused(module.layer_idx, fuses, options)
    call = retrofit.hooks.running
    if key.shape[2] != query.shape[2] or call is None:
        raise ValueError(
            f"layer {module.layer_idx}: a retrofitted model reads a text at once, or goes on in a cache of its own: "
            f"use {compat.CACHE_NAME}=DMCCache() or DMSCache()"
        )
    scaling, mask = options.get("scaling"), as_tensor(mask)
    _refuse_packing(module, mask, call.is_real)
    if retrofit.settings.clears_queries:
        query = without_channel(module, query, retrofit)
    out = attend_parallel(
        query,
        key,
        value,
        as_boolean(mask),
        call,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        options.get("softcap"),
        options.get("dropout") or 0.0,
    )
    return out.transpose(1, 2).contiguous(), None


def _refuse_packing(module, mask, is_real) -> None:
    """Several texts in one row look like padding to the decisions, which do not know where one begins."""
    if mask is None:
        return
    given, mask, T = mask, as_boolean(mask), mask.shape[-1]
    is_bias = given.dtype != torch.bool and (mask & (given != 0)).any()
    expected = torch.ones(T, T, dtype=torch.bool, device=mask.device).tril()
    expected = expected if is_real is None else expected & is_real[:, None, None]
    # some attention functions let a query that sees nothing see everything
    if is_bias or ((mask != expected) & ~mask.all(-1, keepdim=True)).any():
        raise ValueError(
            f"layer {module.layer_idx}: a retrofitted model reads one text per row, causally, padded or not; this mask "
            "says something else (several texts in one row? a bias?)"
        )


def refuse_unfused(layer_idx: int, fuses: bool, options: dict) -> None:
    """Raise ValueError where a model asks attention for what decisions cannot express."""
    asked = [name for name in options if name in unserved(None, options) or name == "s_aux"]
    asked = [name for name in asked if options[name] is not None]
    if asked or not fuses:
        raise ValueError(
            f"layer {layer_idx}: a retrofitted model decides what attention sees, which "
            f"{' and '.join(asked) or 'this attention implementation'} cannot express; load it with "
            'attn_implementation="hf_kvcache" (or "sdpa", "eager")'
        )


def attend_parallel(q, k, v, mask, call, scaling, softcap=None, dropout=0.0) -> torch.Tensor:
    """A whole text at once, without a cache: relaxed decisions add a bias to scores, hard ones end rows.

    Args:
        q, k, v: `[B, Hq | Hkv, T, D]`, keys and values merged already.
        mask: boolean, True = visible, `[B, 1, T, T]`; None for causal.
        call: what was decided.

    Returns:
        `[B, Hq, T, D]`.
    """
    delay, T = call.settings.delay, q.shape[2]
    if not call.is_relaxed:
        position = torch.arange(T, dtype=torch.int32, device=q.device)
        seen_until = expiry(call.alpha, call.is_real, 0, delay)
        return attend_until(q, k, v, position, seen_until, position, scaling=scaling, softcap=softcap)
    if flex.can_attend(q, dropout):
        return flex.attend_flex(q, k, v, call.left, call.is_real, delay, scaling=scaling, softcap=softcap)
    bias = hiding_bias(call.left, delay)  # [B, Hkv, T, T]
    if mask is not None:
        # a padded query sees itself, so that its row is a number
        mask = mask | torch.eye(T, dtype=torch.bool, device=q.device)
        bias = bias.masked_fill(~mask, float("-inf"))
    grouped = q.unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, T, D]
    scores = (grouped.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, grouped.shape[2:4]) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores + bias.unsqueeze(2).to(scores.dtype), -1)
    weights = F.dropout(weights, dropout)
    return (weights.flatten(2, 3) @ v).view_as(q)


def without_channel(module, q: torch.Tensor, retrofit) -> torch.Tensor:
    """Queries `[B, Hq, S, D]` without the borrowed channel after RoPE, too: for retrofits that were made so."""
    settings = retrofit.settings
    if retrofit.fade:
        return q
    q = q.clone()
    heads = q if settings.merges else q.unflatten(1, (-1, module.num_key_value_groups))[:, :, 0]
    heads[..., settings.neuron] = 0
    return q
