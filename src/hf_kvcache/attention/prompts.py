"""Attention of a prompt, or of a part of it, by our op where it is faster than sdpa, or than blocks in float32."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hf_kvcache.attention.call import AttentionCall, unserved
from hf_kvcache.attention.mask import KVMask, is_only_causal
from hf_kvcache.kernels import choose
from hf_kvcache.kernels.merge_states import merge_two, with_sink
from hf_kvcache.kernels.prompt_attention import prompt_attention

ROWS = 4096  # packed rows that are decoded at a time


def attend_prompt(call: AttentionCall):
    """Attend over the rows of `call.view`, which stand in the order of the text in all heads; as `attend_tensors`.

    Packed rows are decoded block by block.
    """
    view = call.view
    if call.n_new == 1 or not call.fuses:
        return None
    if view.is_prefill:
        # a layer need not have kept them
        return attend_tensors(call.query, view.new_k, view.new_v, call.mask, call.options)
    store, has_gone = view.layer.store, view.n_kept < view.tokens_seen
    if store.is_ragged and store.n_packed:
        return None
    if not _is_served(call.query, view.new_k, view.new_v, call.mask, call.options):
        return None
    # a mask about other tokens is refused elsewhere
    if not has_gone and not (call.mask.is_of_last and call.mask.n_columns == view.tokens_seen):
        return None
    # rows that are left are older than those of the call, and seen
    if has_gone and (not is_only_causal(call.mask) or view.layer.has_padding or store.is_ragged):
        return None
    is_real = None
    if call.mask.padding is not None:
        is_real = _padding(call.mask, view.new_k.shape[0], view.n_kept)
        if is_real is None:
            return None
        is_real = store.to_view_order(is_real)
    blocks = view.blocks(ROWS) if store.n_packed else [view.in_view_order()]
    return _attend(call.query, blocks, view.n_kept, is_real, call.options)


def attend_tensors(query: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, mask, options: dict):
    """Attend over tensors `[B, Hkv, N, D]`, of which the last rows are those of the queries.

    Args:
        query: `[B, Hq, S, D]`, or None where they do not fit the rows.
        k, v: all rows, in the order of the text.
        mask: a `KVMask` or whatever else the model has.
        options: further arguments of the call of attention.

    Returns:
        The output `[B, S, Hq, D]`, and None for attention weights. None instead of both where this call is not one for
        the op: on a GPU, for instance, sdpa is made for it.
    """
    if not _is_served(query, k, v, mask, options) or query.shape[2] == 1:
        return None
    if not (mask.is_of_last and mask.n_columns == k.shape[2] >= query.shape[2]):
        return None
    is_real = None if mask.padding is None else _padding(mask, k.shape[0], k.shape[2])
    if is_real is None and mask.padding is not None:
        return None
    return _attend(query, [(k, v)], k.shape[2], is_real, options)


def _is_served(query, k, v, mask, options: dict) -> bool:
    """Whether the op does all that a call asks for, and has more than the reference for it."""
    if query is None or type(mask) is not KVMask or not mask.is_causal or torch.compiler.is_compiling():
        return False
    # under autocast keys are float32 after RoPE and values bfloat16, which sdpa sees to
    if not query.dtype == k.dtype == v.dtype or query.shape[-1] != k.shape[-1] or query.shape[1] % k.shape[1]:
        return False
    is_trained = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    if is_trained or options.get("dropout") or unserved(query, options):
        return False
    return choose("prompt_attention", query.device, (query, v)).backend == "native"


def _padding(mask: KVMask, batch: int, n_rows: int) -> torch.Tensor | None:
    """Which rows are real, boolean `[B, N]`; None where the mask says that of others."""
    is_real = mask.padding[:, :n_rows]
    return is_real if is_real.dtype == torch.bool and is_real.shape == (batch, n_rows) else None


def _attend(query, blocks: Iterable[tuple[torch.Tensor, torch.Tensor]], n_rows: int, is_real, options: dict):
    scaling, sinks, found, start = options.get("scaling"), options.get("s_aux"), None, 0
    how = {"scaling": query.shape[-1] ** -0.5 if scaling is None else scaling, "softcap": options.get("softcap")}
    for k, v in blocks:
        stop = start + k.shape[2]
        real = None if is_real is None else is_real[:, start:stop]
        part = prompt_attention(query, k, v, is_real=real, own=n_rows - query.shape[2] - start, **how)
        found, start = part if found is None else merge_two(found, part), stop
    out, lse = found
    if sinks is not None:
        out, _ = with_sink(out, lse, sinks)
    return out.transpose(1, 2).contiguous(), None
