"""The attention function that transformers calls, and the pass-throughs for models loaded without naming it."""

from __future__ import annotations

import functools
import threading

import torch

from hf_kvcache import compat
from hf_kvcache.adapters.modules import attached_retrofit
from hf_kvcache.attention import compacted
from hf_kvcache.attention.fused import MAX_QUERIES, attend
from hf_kvcache.attention.mask import KVMask, as_additive, as_boolean, resolve
from hf_kvcache.view import KVView

NAME = "hf_kvcache"
_REGISTERING = threading.Lock()

# arguments that change the softmax itself; the model's own function gets dense tensors when one is in use
_UNFUSED = ("s_aux", "position_bias", "head_mask", "output_attentions")


def kv_attention(module, query, key, value, attention_mask, **kwargs):
    """`attn_implementation="hf_kvcache"`: attention over a `KVView`; without one, exactly sdpa (softcap included).

    Args:
        module: the attention module.
        query: `[B, Hq, S, D]`, after RoPE.
        key, value: the `KVView` that `KVCache.update` returned, or tensors `[B, Hkv, N, D]`.
        attention_mask: `KVMask`, a tensor, or None.

    Returns:
        The output `[B, S, Hq, D]`, and None in place of the attention weights.
    """
    if isinstance(key, KVView):
        return _attend(_exact, module, query, key, attention_mask, **kwargs)
    if (retrofit := attached_retrofit(module)) is not None:
        if retrofit.compresses:
            return _attend_retrofitted(retrofit, module, query, key, value, attention_mask, **kwargs)
        if retrofit.settings.clears_queries:
            query = compacted.without_channel(module, query, retrofit)
    return _exact(module, query, key, value, _tensor(attention_mask), **kwargs)


def kv_mask(batch_size, q_length, kv_length, attention_mask=None, **kwargs):
    """The mask function that goes with `kv_attention`: a `KVMask`."""
    if isinstance(attention_mask, KVMask):
        return attention_mask
    return KVMask(batch_size, q_length, kv_length, attention_mask=attention_mask, **kwargs)


def register() -> None:
    """Make `attn_implementation="hf_kvcache"` known."""
    compat.register_attention(NAME, kv_attention)
    compat.register_mask(NAME, kv_mask)


def register_pass_throughs() -> None:
    """Let every registered attention function meet a `KVView`; without one, what was there is called unchanged."""
    with _REGISTERING:
        functions = compat.attention_functions()
        functions.setdefault("eager", _eager)
        for name, stock in functions.items():
            if name == NAME or KVView in getattr(stock, "_passes_views", ()):
                continue
            compat.register_attention(name, _pass_through(stock, fuses=name in ("sdpa", "eager")))


def _pass_through(stock, fuses):
    @functools.wraps(stock)
    def attention(module, query, key, value, attention_mask, **kwargs):
        if isinstance(key, KVView):
            return _attend(stock, module, query, key, attention_mask, fuses=fuses, **kwargs)
        # what another copy of this code has for a view is that one's business
        if isinstance(key, torch.Tensor) and (retrofit := attached_retrofit(module)) is not None:
            if retrofit.compresses:
                return _attend_retrofitted(retrofit, module, query, key, value, attention_mask, fuses=fuses, **kwargs)
            if retrofit.settings.clears_queries:
                query = compacted.without_channel(module, query, retrofit)
        return stock(module, query, key, value, attention_mask, **kwargs)

    # several copies of this code may be at work: a model's repository can bring its own
    attention._passes_views = {KVView} | getattr(stock, "_passes_views", set())
    return attention


def _attend(stock, module, query, view, mask, fuses=True, **kwargs):
    """Append has happened in `update`: attend, then let the layer compress."""
    n_new = query.shape[2]
    if view.cache is not None and not view.cache.bind(module, view):
        # the layer turned out to be one that transformers' own class serves
        return stock(module, query, view.new_k, view.new_v, _tensor(mask), **kwargs)
    view.module = module
    if view.layer.decides:
        _refuse_unfused(module, fuses, kwargs)
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if attached_retrofit(module).settings.clears_queries:
            query = compacted.without_channel(module, query, attached_retrofit(module))
        out = compacted.attend_rows(query, view, scaling, kwargs.get("softcap"))
        view.layer.settle(query, view)
        view.cache.after_attention(module.layer_idx)
        return out.transpose(1, 2).contiguous(), None
    view.layer.note_padding(mask, n_new)
    view.layer.note_positions(kwargs.get("position_ids"), mask, n_new)
    view.layer.project_new(n_new)
    if view.is_prefill:
        out = stock(module, query, view.new_k, view.new_v, _tensor(mask), **kwargs)
    elif not fuses or kwargs.get("dropout") or any(kwargs.get(name) is not None for name in _UNFUSED):
        out = _attend_dense(stock, module, query, view, mask, **kwargs)
    elif n_new > MAX_QUERIES and not view.layer.store.n_packed and not _differ_in_padding(view):
        # a chunk of a prompt over rows that are dense anyway: the model's own function is made for that
        out = stock(module, query, *view.materialize(), resolve(view, mask, n_new), **kwargs)
    else:
        scaling = kwargs.get("scaling")
        attended = attend(
            query,
            view,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            mask=functools.partial(resolve, view, mask, n_new),
            softcap=kwargs.get("softcap"),
        )
        out = attended.transpose(1, 2).contiguous(), None
    view.layer.settle(query, view, kwargs.get("scaling"), kwargs.get("softcap"))
    if view.cache is not None:
        view.cache.after_attention(module.layer_idx)
    return out


def _attend_retrofitted(retrofit, module, query, key, value, mask, fuses=True, **kwargs):
    """A retrofitted model without a cache: training, and evaluation of whole texts."""
    _refuse_unfused(module, fuses, kwargs)
    call = retrofit.hooks.running
    if key.shape[2] != query.shape[2] or call is None:
        raise ValueError(
            f"layer {module.layer_idx}: a retrofitted model reads a text at once, or goes on in a cache of its own: "
            f"use {compat.CACHE_NAME}=DMCCache() or DMSCache()"
        )
    scaling, mask = kwargs.get("scaling"), _tensor(mask)
    _refuse_packing(module, mask, call.is_real)
    mask = as_boolean(mask)
    if retrofit.settings.clears_queries:
        query = compacted.without_channel(module, query, retrofit)
    out = compacted.attend_parallel(
        query,
        key,
        value,
        mask,
        call,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        kwargs.get("softcap"),
        kwargs.get("dropout") or 0.0,
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


def _refuse_unfused(module, fuses, kwargs) -> None:
    asked = [name for name in _UNFUSED if kwargs.get(name) is not None and kwargs[name] is not False]
    if asked or not fuses:
        raise ValueError(
            f"layer {module.layer_idx}: a retrofitted model decides what attention sees, which "
            f"{' and '.join(asked) or 'this attention implementation'} cannot express; load it with "
            'attn_implementation="hf_kvcache" (or "sdpa", "eager")'
        )


def _differ_in_padding(view) -> bool:
    """Whether heads have kept different numbers of pads, which a mask for all heads cannot say."""
    return view.layer.has_padding and view.n_kept < view.tokens_seen


def _attend_dense(stock, module, query, view, mask, **kwargs):
    """Hand dense tensors to a function that can only read those; one layer is dense at a time."""
    has_evicted = view.layer.evicted_at is not None
    if has_evicted and (mask is not None or query.shape[2] > 1 or view.layer.store.is_ragged):
        raise ValueError(
            f"layer {module.layer_idx} has evicted rows, which the mask of this attention implementation cannot "
            'express; load the model with attn_implementation="hf_kvcache"'
        )
    k, v = view.materialize()
    return stock(module, query, k, v, _tensor(mask), **kwargs)


def _exact(module, query, key, value, mask, **kwargs):
    if kwargs.get("softcap") is not None:
        return _eager(module, query, key, value, mask, **kwargs)
    return compat.sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def _eager(module, query, key, value, mask, **kwargs):
    mask = as_additive(mask, key.shape[2], query.shape[2], query) if _is_ours(mask) else mask
    return compat.eager_attention(module)(module, query, key, value, mask, **kwargs)


def _is_ours(mask) -> bool:
    # stock eager masks are additive tensors already; ours are boolean, or absent where sdpa would need none
    return mask is None or mask.dtype == torch.bool


def _tensor(mask):
    return mask.dense() if isinstance(mask, KVMask) else mask
