"""Attention over what a layer keeps: on the stored bytes, or by a function that wants tensors."""

from __future__ import annotations

import torch

from hf_kvcache.attention.call import AttentionCall, as_tensor
from hf_kvcache.attention.fused import MAX_QUERIES, attend, reads_pages
from hf_kvcache.attention.mask import for_heads, is_only_causal, resolve
from hf_kvcache.kernels import fast_backend


def attend_rows(call: AttentionCall):
    """Attend over the rows of `call.view`: the output `[B, S, Hq, D]`, and attention weights or None."""
    view, n_new = call.view, call.n_new
    if (view.is_prefill or n_new > MAX_QUERIES) and fast_backend(view.device) == "native":
        from hf_kvcache.attention.prompts import attend_prompt

        if attended := attend_prompt(call):
            return attended
    if view.is_prefill:
        return call.with_tensors(view.new_k, view.new_v, as_tensor(call.mask))
    if not call.fuses or call.unserved or call.options.get("dropout"):
        return _attend_tensors(call)
    layer, rows = view.layer, None
    if not call.sees_all:
        if not (is_only_causal(call.mask) and reads_pages(view, n_new)):
            rows = resolve(view, call.mask, n_new)
        serves_all = rows is None or rows.shape[1] == 1
        # a chunk of a prompt over rows that are dense anyway: the model's own function is made for that
        is_chunk = n_new > MAX_QUERIES and not layer.store.n_packed and serves_all
        is_plain = rows is None or (rows.dtype == torch.bool and rows.shape[1] in (1, layer.n_kv_heads))
        if is_chunk or not is_plain:
            return call.with_tensors(*view.in_view_order(), for_heads(rows, call.query.shape[1]))
    out = attend(call.query, view, scaling=call.scaling, mask=rows, softcap=call.softcap, sinks=call.sinks)
    return out.transpose(1, 2).contiguous(), None


def _attend_tensors(call: AttentionCall):
    """Hand dense tensors to a function that can only read those; one layer is dense at a time.

    Raises:
        ValueError: rows have gone that the function could not know of.
    """
    view, layer = call.view, call.view.layer
    if view.n_kept == view.tokens_seen and not (layer.store.is_ragged and layer.store.n_packed):
        return call.with_tensors(*view.materialize(), as_tensor(call.mask))
    if call.unserved:
        what = " and ".join(call.unserved)
        raise ValueError(
            f"layer {layer.layer_idx} has evicted rows, so that {what} can no longer be about all tokens; use a cache "
            "that keeps every token for that (KVCache(), QuantCache(4)), or ask for it in the first call only"
        )
    if call.mask is not None or call.n_new > 1 or layer.store.is_ragged:
        raise ValueError(NO_MASK.format(layer=layer.layer_idx))
    return call.with_tensors(*view.materialize(), None)


def attend_handed(call: AttentionCall, key: torch.Tensor, value: torch.Tensor):
    """Attention over tensors that a model has made of the rows: latents that it has expanded, say.

    Raises:
        ValueError: rows have gone that attention cannot be told of.
    """
    view, layer, query = call.view, call.view.layer, call.query
    if layer.policy is not None and layer.n_kv_heads not in (1, key.shape[1]):
        raise ValueError(
            f"layer {layer.layer_idx}: {type(layer.policy).__name__} lets heads keep different tokens, and this model "
            f"makes {key.shape[1]} heads of {layer.n_kv_heads} before attention, in an order of its own; use a cache "
            "that keeps all tokens"
        )
    if layer.policy is None or view.is_prefill:
        rows = as_tensor(call.mask)
    elif not call.fuses and (call.mask is not None or call.n_new > 1) and view.n_kept < view.tokens_seen:
        raise ValueError(NO_MASK.format(layer=layer.layer_idx))
    else:
        rows = for_heads(resolve(view, call.mask, call.n_new), query.shape[1])
    return call.with_tensors(key, value, rows)


NO_MASK = (
    "layer {layer} has evicted rows, which the mask of this attention implementation cannot express; load the model "
    'with attn_implementation="hf_kvcache"'
)
