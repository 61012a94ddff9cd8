"""The attention function that transformers calls, and the pass-throughs for models loaded without naming it."""

from __future__ import annotations

import functools
import threading

import torch

from hf_kvcache import compat
from hf_kvcache.attention.call import AttentionCall, as_tensor
from hf_kvcache.attention.exact import eager, exact_attention, over_tensors
from hf_kvcache.attention.guest import guest_of
from hf_kvcache.attention.mask import KVMask
from hf_kvcache.attention.rows import attend_handed, attend_rows
from hf_kvcache.handed import handed_out
from hf_kvcache.view import KVView, ValueView

NAME = "hf_kvcache"
_REGISTERING = threading.Lock()


def kv_attention(module, query, key, value, attention_mask, **kwargs):
    """`attn_implementation="hf_kvcache"`: attention over a `KVView`; without one, sdpa, or our op for prompts on a CPU.

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
            if attention_mask.is_causal:
                kwargs["is_causal"] = True
        elif attention_mask is None and isinstance(key, torch.Tensor):
            # our mask function always makes one, so that none means none: the model's vision tower, for one
            kwargs["is_causal"] = getattr(module, "is_causal", False)
    if type(key) is KVView and type(value) is ValueView and value.view is key:
        return _serve_view(AttentionCall(key, query, attention_mask, module, exact_attention, **kwargs))
    return _serve(exact_attention, True, module, query, key, value, attention_mask, kwargs)


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
        functions.setdefault("eager", eager)
        for name, base in functions.items():
            if name == NAME or KVView in getattr(base, "_passes_views", ()):
                continue
            compat.register_attention(name, _pass_through(base, name in ("sdpa", "eager"), name == "eager"))


def _pass_through(base, fuses: bool, returns_weights: bool):
    @functools.wraps(base)
    def attention(module, query, key, value, attention_mask, **kwargs):
        # what another copy of this code has for a view is that one's business
        if isinstance(key, (KVView, ValueView, torch.Tensor)):
            if returns_weights and compat.collects_attentions():
                # not every model says so to its attention
                kwargs["output_attentions"] = True
            if type(key) is KVView and type(value) is ValueView and value.view is key:
                return _serve_view(AttentionCall(key, query, attention_mask, module, base, fuses, **kwargs))
            return _serve(base, fuses, module, query, key, value, attention_mask, kwargs)
        return base(module, query, key, value, attention_mask, **kwargs)

    # several copies of this code may be at work: a model's repository can bring its own
    attention._passes_views = {KVView} | getattr(base, "_passes_views", set())
    return attention


def _serve(base, fuses, module, query, key, value, mask, options):
    """Attention over tensors, some of which a model may have made of views."""
    view = next(
        (x if isinstance(x, KVView) else x.view for x in (key, value) if isinstance(x, (KVView, ValueView))), None
    )
    # a model may have changed one side only
    key, value = (x._tensor() if isinstance(x, (KVView, ValueView)) else x for x in (key, value))
    cache = None if torch.compiler.is_compiling() else handed_out(module, key)
    if cache is not None:
        call = AttentionCall(cache.take_back(), query, mask, module, base, fuses, **options)
        return _serve_handed(cache, call, key, value)
    if view is not None and view.layer.policy is not None:
        raise ValueError(
            f"layer {view.layer.layer_idx}: this model reads the rows of a call more than once, and "
            f"{type(view.layer.policy).__name__} evicts after the first time; use a cache that keeps all tokens"
        )
    if (guest := guest_of(module)) is not None:
        return guest.attend_tensors(module, query, key, value, mask, base, fuses, options)
    if isinstance(mask, KVMask) and isinstance(mask.n_columns, int) and mask.n_columns < key.shape[-2]:
        raise ValueError(
            f"{type(module).__name__} attends to {key.shape[-2]} rows under a mask of {mask.n_columns} tokens, which "
            "it would have changed had it been a tensor; load the model with its own attn_implementation, such as "
            '"eager"'
        )
    return over_tensors(base, module, query, key, value, mask, options)


def _serve_view(call: AttentionCall):
    """Append has happened in `update`: attend, then let the layer compress."""
    view, layer = call.view, call.view.layer
    cache, is_first = view.cache, not view.is_read
    view.is_read, view.module = True, call.module
    if cache is not None and not (is_first and layer.met is not None and layer.met() is call.module):
        # the module that has made the rows comes first; a layer without keys of its own reads those of an earlier one
        if not (cache.meet(call) if is_first else cache.holds(view)):
            # the layer turned out to be one that transformers' own class serves
            return call.with_tensors(view.new_k, view.new_v, as_tensor(call.mask))
    if not is_first:
        return (layer.attend or attend_rows)(call)
    layer.prepare(call)
    out = (layer.attend or attend_rows)(call)
    layer.compress(call)
    if cache is not None and cache.offloading:
        cache.offload_layer(layer.layer_idx)
    return out


def _serve_handed(cache, call: AttentionCall, key, value):
    """Attention over tensors that a model has made of what a view gave it."""
    if not cache.meet(call):
        return call.with_tensors(key, value, as_tensor(call.mask))
    layer = call.view.layer
    layer.prepare(call)
    out = attend_handed(call, key, value)
    # the queries are of the expanded rows
    call.query = None
    layer.compress(call)
    if cache.offloading:
        cache.offload_layer(layer.layer_idx)
    return out


# a copy of this file in a model's repository leaves the name to the library
if __name__ == "hf_kvcache.attention.interface":
    register()
