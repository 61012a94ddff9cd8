"""Attention of a prompt, or of a part of it, over dense rows: by our op where it is faster than sdpa."""

from __future__ import annotations

import torch

from hf_kvcache.attention.call import AttentionCall, unserved
from hf_kvcache.attention.mask import KVMask, is_only_causal
from hf_kvcache.kernels import choose
from hf_kvcache.kernels.merge_states import with_sink
from hf_kvcache.kernels.prompt_attention import prompt_attention


def attend_prompt(call: AttentionCall):
    """Attend over the rows of `call.view`, where they are dense and in the order of the text; as `attend_tensors`."""
    view = call.view
    if call.n_new == 1 or not call.fuses:
        return None
    if view.is_prefill:
        k, v = view.new_k, view.new_v
    elif view.layer.store.n_packed or (view.n_kept < view.tokens_seen and not _is_plain(call)):
        return None
    else:
        k, v = view.in_view_order()
    return attend_tensors(call.query, k, v, call.mask, call.options, all_seen=view.n_kept < view.tokens_seen)


def attend_tensors(query: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, mask, options: dict, all_seen=False):
    """Attend over tensors `[B, Hkv, N, D]`, of which the last rows are those of the queries.

    Args:
        query: `[B, Hq, S, D]`, or None where they do not fit the rows.
        k, v: all rows, in the order of the text.
        mask: a `KVMask` or whatever else the model has.
        options: further arguments of the call of attention.
        all_seen: whether rows have gone, so that the mask is about others, and those that are left are all seen.

    Returns:
        The output `[B, S, Hq, D]`, and None for attention weights. None instead of both where this call is not one for
        the op: on a GPU, for instance, sdpa is made for it.
    """
    if query is None or query.shape[2] == 1 or type(mask) is not KVMask or not mask.is_causal:
        return None
    if torch.compiler.is_compiling() or options.get("dropout") or unserved(query, options):
        return None
    if not all_seen and not (isinstance(mask.n_columns, int) and mask.n_columns == k.shape[2] >= query.shape[2]):
        return None
    is_real = None if mask.padding is None else mask.padding[:, : k.shape[2]]
    fits = is_real is None or (is_real.dtype == torch.bool and is_real.shape == (k.shape[0], k.shape[2]))
    is_trained = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    if not fits or is_trained or choose("prompt_attention", query.device, (query, v)).backend != "native":
        return None
    scaling = options.get("scaling")
    scaling = k.shape[-1] ** -0.5 if scaling is None else scaling
    out, lse = prompt_attention(query, k, v, scaling=scaling, is_real=is_real, softcap=options.get("softcap"))
    if options.get("s_aux") is not None:
        out, _ = with_sink(out, lse, options["s_aux"])
    return out.transpose(1, 2).contiguous(), None


def _is_plain(call: AttentionCall) -> bool:
    """Whether rows that are left are all seen, and older than those of the call."""
    return is_only_causal(call.mask) and not call.view.layer.has_padding and not call.view.layer.store.is_ragged
