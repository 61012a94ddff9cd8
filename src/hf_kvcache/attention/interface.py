"""The attention function that transformers calls, and the pass-throughs for models loaded without naming it."""

from __future__ import annotations

import functools
import threading
from inspect import signature

import torch

from hf_kvcache import compat
from hf_kvcache.adapters.modules import attached_retrofit
from hf_kvcache.attention import compacted
from hf_kvcache.attention.blockwise import attend_dense
from hf_kvcache.attention.fused import MAX_QUERIES, attend, reads_pages
from hf_kvcache.attention.handed import handed_out
from hf_kvcache.attention.mask import (
    KVMask,
    as_additive,
    as_boolean,
    causal,
    for_heads,
    is_only_causal,
    resolve,
    without_bias,
)
from hf_kvcache.kernels.merge_states import with_sink
from hf_kvcache.view import KVView, ValueView

NAME = "hf_kvcache"
_REGISTERING = threading.Lock()

# what the ops of this library act on, beside what needs no action
_SERVED = compat.HARMLESS_ARGUMENTS | {"dropout", "scaling", "softcap", "s_aux", "is_causal"}


def kv_attention(module, query, key, value, attention_mask, **kwargs):
    """`attn_implementation="hf_kvcache"`: attention over a `KVView`; without one, exactly sdpa.

    Softcap and attention sinks (`s_aux`) are served; an argument that is not understood goes, with dense tensors, to
    the model's own eager attention.

    Args:
        module: the attention module.
        query: `[B, Hq, S, D]`, after RoPE.
        key, value: what `KVCache.update` returned, or tensors `[B, Hkv, N, D]`.
        attention_mask: `KVMask`, a tensor, or None.

    Returns:
        The output `[B, S, Hq, D]`, and the attention weights, which are None but for `output_attentions=True`.
    """
    if kwargs.get("is_causal") is None:
        # where a mask goes without saying, sdpa would ask the module, and some say nothing
        if isinstance(attention_mask, KVMask):
            kwargs |= {"is_causal": True} if attention_mask.is_causal else {}
        elif attention_mask is None and isinstance(key, torch.Tensor):
            # our mask function always makes one, so that none means none: the model's vision tower, for one
            kwargs["is_causal"] = getattr(module, "is_causal", False)
    return _serve(_exact, module, query, key, value, attention_mask, **kwargs)


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
            returns_weights = name == "eager"
            compat.register_attention(name, _pass_through(stock, name in ("sdpa", "eager"), returns_weights))


def _pass_through(stock, fuses, returns_weights=False):
    @functools.wraps(stock)
    def attention(module, query, key, value, attention_mask, **kwargs):
        # what another copy of this code has for a view is that one's business
        if isinstance(key, (KVView, ValueView, torch.Tensor)):
            if returns_weights and compat.collects_attentions():
                # not every model says so to its attention
                kwargs["output_attentions"] = True
            return _serve(stock, module, query, key, value, attention_mask, fuses, **kwargs)
        return stock(module, query, key, value, attention_mask, **kwargs)

    # several copies of this code may be at work: a model's repository can bring its own
    attention._passes_views = {KVView} | getattr(stock, "_passes_views", set())
    return attention


def _serve(stock, module, query, key, value, mask, fuses=True, **kwargs):
    """Attention over whatever a model hands over: views, tensors made of views, or tensors."""
    if isinstance(key, KVView) and isinstance(value, ValueView) and value.view is key:
        return _attend(stock, module, query, key, mask, fuses, **kwargs)
    view = next(
        (x if isinstance(x, KVView) else x.view for x in (key, value) if isinstance(x, (KVView, ValueView))), None
    )
    # a model may have changed one side only
    key, value = (x._tensor() if isinstance(x, (KVView, ValueView)) else x for x in (key, value))
    cache = None if torch.compiler.is_compiling() else handed_out(module, key)
    if cache is not None:
        return _attend_handed(stock, module, query, key, value, mask, cache, fuses, **kwargs)
    if view is not None and view.layer.policy is not None:
        raise ValueError(
            f"layer {view.layer.layer_idx}: this model reads the rows of a call more than once, and "
            f"{type(view.layer.policy).__name__} evicts after the first time; use a cache that keeps all tokens"
        )
    if (retrofit := attached_retrofit(module)) is not None:
        if retrofit.compresses:
            return _attend_retrofitted(retrofit, module, query, key, value, mask, fuses, **kwargs)
        if retrofit.settings.clears_queries:
            query = compacted.without_channel(module, query, retrofit)
    if isinstance(mask, KVMask) and isinstance(mask.n_columns, int) and mask.n_columns < key.shape[-2]:
        raise ValueError(
            f"{type(module).__name__} attends to {key.shape[-2]} rows under a mask of {mask.n_columns} tokens, which "
            "it would have changed had it been a tensor; load the model with its own attn_implementation, such as "
            '"eager"'
        )
    return stock(module, query, key, value, _tensor(mask), **kwargs)


def _attend(stock, module, query, view, mask, fuses, **kwargs):
    """Append has happened in `update`: attend, then let the layer compress."""
    n_new = query.shape[2]
    # a layer without keys of its own reads those of an earlier one; a layer that is looped has several of the cache
    is_owner, view.is_read = not view.is_read, True
    if view.cache is not None and not (view.cache.bind(module, view) if is_owner else view.cache.holds(view)):
        # the layer turned out to be one that transformers' own class serves
        return stock(module, query, view.new_k, view.new_v, _tensor(mask), **kwargs)
    layer = view.layer
    if layer.decides:
        _refuse_unfused(module, fuses, kwargs)
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if attached_retrofit(module).settings.clears_queries:
            query = compacted.without_channel(module, query, attached_retrofit(module))
        out = compacted.attend_rows(query, view, scaling, kwargs.get("softcap"))
        layer.settle(query, view)
        view.cache.after_attention(module.layer_idx)
        return out.transpose(1, 2).contiguous(), None
    if not is_owner:
        # the owner has seen to everything else
        return _attend_rows(stock, module, query, view, mask, fuses, **kwargs)
    asked = set(not_served(query, kwargs)) - {"output_attentions", "is_causal"}
    if asked and layer.policy is not None:
        raise ValueError(
            f"layer {module.layer_idx}: {type(layer.policy).__name__} evicts tokens, and this model calls attention "
            f"with {' and '.join(sorted(asked))}, which is about all of them; use a cache that keeps every token "
            "(KVCache(), QuantCache(4))"
        )
    view.module = module
    layer.refuse_images(module, mask, n_new)
    layer.note_padding(mask, n_new)
    layer.note_positions(kwargs.get("position_ids"), mask, n_new)
    layer.project_new(n_new)
    out = _attend_rows(stock, module, query, view, mask, fuses, **kwargs)
    layer.settle(query, view, kwargs.get("scaling"), kwargs.get("softcap"))
    if view.cache is not None:
        view.cache.after_attention(module.layer_idx)
    return out


def _attend_rows(stock, module, query, view, mask, fuses, **kwargs):
    """Attention over the rows of a view: on the stored bytes, or by a function that wants tensors."""
    layer, n_new = view.layer, query.shape[2]
    if view.is_prefill:
        return stock(module, query, view.new_k, view.new_v, _tensor(mask), **kwargs)
    if not fuses or kwargs.get("dropout") or not_served(query, kwargs):
        return _attend_tensors(stock, module, query, view, mask, **kwargs)
    rows = None if reads_pages(view, n_new) and is_only_causal(mask) else resolve(view, mask, n_new)
    serves_all = rows is None or rows.shape[1] == 1
    # a chunk of a prompt over rows that are dense anyway: the model's own function is made for that
    is_chunk = n_new > MAX_QUERIES and not layer.store.n_packed and serves_all
    is_plain = rows is None or (rows.dtype == torch.bool and rows.shape[1] in (1, layer.n_kv_heads))
    if is_chunk or not is_plain:
        return stock(module, query, *view.in_view_order(), for_heads(rows, query.shape[1]), **kwargs)
    scaling = kwargs.get("scaling")
    out = attend(
        query,
        view,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=rows,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    return out.transpose(1, 2).contiguous(), None


def _attend_handed(stock, module, query, key, value, mask, cache, fuses, **kwargs):
    """Attention over tensors that a model has made of what a view gave it: latents that it has expanded, say."""
    view = cache.take_back()
    if not cache.bind(module, view):
        return stock(module, query, key, value, _tensor(mask), **kwargs)
    layer, n_new = view.layer, query.shape[2]
    if layer.policy is not None and layer.n_kv_heads not in (1, key.shape[1]):
        raise ValueError(
            f"layer {module.layer_idx}: {type(layer.policy).__name__} lets heads keep different tokens, and this model "
            f"makes {key.shape[1]} heads of {layer.n_kv_heads} before attention, in an order of its own; use a cache "
            "that keeps all tokens"
        )
    layer.note_padding(mask, n_new)
    layer.note_positions(kwargs.get("position_ids"), mask, n_new)
    if layer.policy is None or view.is_prefill:
        rows = _tensor(mask)
    elif not fuses and (mask is not None or n_new > 1) and view.n_kept < view.tokens_seen:
        raise ValueError(_NO_MASK.format(layer=module.layer_idx))
    else:
        rows = for_heads(resolve(view, mask, n_new), query.shape[1])
    out = stock(module, query, key, value, rows, **kwargs)
    layer.settle(None, view, kwargs.get("scaling"), kwargs.get("softcap"))
    cache.after_attention(module.layer_idx)
    return out


def _attend_retrofitted(retrofit, module, query, key, value, mask, fuses, **kwargs):
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
    asked = [name for name in kwargs if name in not_served(None, kwargs) or name == "s_aux"]
    asked = [name for name in asked if kwargs[name] is not None]
    if asked or not fuses:
        raise ValueError(
            f"layer {module.layer_idx}: a retrofitted model decides what attention sees, which "
            f"{' and '.join(asked) or 'this attention implementation'} cannot express; load it with "
            'attn_implementation="hf_kvcache" (or "sdpa", "eager")'
        )


def not_served(query, kwargs) -> list[str]:
    """Arguments of an attention call that the ops of this library do not act on, and that ask for something.

    Args:
        query: `[B, Hq, S, D]`, or None where the number of heads does not matter.
        kwargs: arguments of the call.
    """
    asked = [n for n, value in kwargs.items() if n not in _SERVED and value is not None and value is not False]
    if kwargs.get("is_causal") is False:
        asked.append("is_causal")
    sinks = kwargs.get("s_aux")
    if sinks is not None and query is not None and sinks.shape != query.shape[1:2]:
        asked.append("s_aux")
    return asked


_NO_MASK = (
    "layer {layer} has evicted rows, which the mask of this attention implementation cannot express; load the model "
    'with attn_implementation="hf_kvcache"'
)


def _attend_tensors(stock, module, query, view, mask, **kwargs):
    """Hand dense tensors to a function that can only read those; one layer is dense at a time."""
    layer, n_new = view.layer, query.shape[2]
    if view.n_kept == view.tokens_seen and not (layer.store.is_ragged and layer.store.n_packed):
        return stock(module, query, *view.materialize(), _tensor(mask), **kwargs)
    if asked := not_served(query, kwargs):
        what = " and ".join(asked)
        raise ValueError(
            f"layer {module.layer_idx} has evicted rows, so that {what} can no longer be about all tokens; use a cache "
            "that keeps every token for that (KVCache(), QuantCache(4)), or ask for it in the first call only"
        )
    if mask is not None or n_new > 1 or layer.store.is_ragged:
        raise ValueError(_NO_MASK.format(layer=module.layer_idx))
    return stock(module, query, *view.materialize(), None, **kwargs)


def _exact(module, query, key, value, mask, **kwargs):
    """Attention over tensors: sdpa, or what the model itself has where sdpa would leave something out."""
    asked = set(not_served(query, kwargs)) - compat.SDPA_ARGUMENTS
    is_trained = torch.is_grad_enabled() and query.requires_grad
    if asked - {"output_attentions", "s_aux"}:
        _check_eager(module, asked - {"output_attentions", "s_aux"})
    sinks, is_causal = kwargs.get("s_aux"), kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    hides = mask if sinks is None else without_bias(mask)
    # with sinks, what is not in blocks of rows is the model's own
    is_unusual = kwargs.get("dropout") or is_trained or kwargs.get("position_bias") is not None
    is_unusual = is_unusual or (hides is not None and (hides.dtype != torch.bool or hides.shape[1] > key.shape[1]))
    if asked or kwargs.get("softcap") is not None or (sinks is not None and is_unusual):
        if mask is None and is_causal and query.shape[2] > 1:
            mask = causal(key.shape[2], query.shape[2], query.device)
        return _eager(module, query, key, value, mask, **kwargs)
    if sinks is None:
        return compat.sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, lse = attend_dense(query, key, value, scaling=scaling, mask=hides, is_causal=is_causal)
    return with_sink(out, lse, sinks)[0].transpose(1, 2).contiguous(), None


def _check_eager(module, names) -> None:
    """Raise NotImplementedError where the model's own attention would drop an argument, as any function may."""
    unknown = sorted(names - set(signature(compat.eager_attention(module)).parameters))
    if unknown:
        raise NotImplementedError(
            f"{type(module).__name__} calls attention with {', '.join(unknown)}, which neither this library nor the "
            'eager attention of the model acts on; load the model with its own attn_implementation ("sdpa" or "eager")'
        )


def _eager(module, query, key, value, mask, **kwargs):
    """The model's own eager attention, which adds its mask; without one, everybody sees everything."""
    return compat.eager_attention(module)(module, query, key, value, as_additive(mask, query), **kwargs)


def _tensor(mask):
    return mask.dense() if isinstance(mask, KVMask) else mask


# a copy of this file in a model's repository leaves the name to the library
if __name__ == "hf_kvcache.attention.interface":
    register()
