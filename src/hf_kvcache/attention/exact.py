"""Attention over tensors: sdpa, or what the model itself has where sdpa would leave something out."""

from __future__ import annotations

from inspect import signature

import torch

from hf_kvcache import compat
from hf_kvcache.attention.blockwise import attend_dense
from hf_kvcache.attention.call import as_tensor, unserved
from hf_kvcache.attention.mask import as_additive, causal, without_bias
from hf_kvcache.kernels import fast_backend
from hf_kvcache.kernels.merge_states import with_sink


def exact_attention(module, query, key, value, mask, **options):
    """Attention over tensors `[B, Hkv, N, D]` with every argument acted on.

    Returns:
        The output `[B, S, Hq, D]`, and the attention weights, which are None but for `output_attentions=True`.

    Raises:
        NotImplementedError: an argument that neither sdpa nor the model's own eager attention acts on.
    """
    asked = set(unserved(query, options)) - compat.SDPA_ARGUMENTS
    is_trained = torch.is_grad_enabled() and query.requires_grad
    if asked - {"output_attentions", "s_aux"}:
        _check_eager(module, asked - {"output_attentions", "s_aux"})
    sinks, is_causal = options.get("s_aux"), options.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    hides = mask if sinks is None else without_bias(mask)
    # with sinks, what is not in blocks of rows is the model's own
    is_unusual = options.get("dropout") or is_trained or options.get("position_bias") is not None
    is_unusual = is_unusual or (hides is not None and (hides.dtype != torch.bool or hides.shape[1] > key.shape[1]))
    if asked or options.get("softcap") is not None or (sinks is not None and is_unusual):
        if mask is None and is_causal and query.shape[2] > 1:
            mask = causal(key.shape[2], query.shape[2], query.device)
        return eager(module, query, key, value, mask, **options)
    if sinks is None:
        return compat.sdpa_attention_forward(module, query, key, value, mask, **options)
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, lse = attend_dense(query, key, value, scaling=scaling, mask=hides, is_causal=is_causal)
    return with_sink(out, lse, sinks)[0].transpose(1, 2).contiguous(), None


def over_tensors(base, module, query, key, value, mask, options: dict):
    """The attention function `base` over tensors, or our op where that would be `exact_attention` and it is faster.

    Args:
        base, module: an attention function, and the attention module that calls it.
        query, key, value: `[B, H, S | N, D]`.
        mask: a `KVMask`, a tensor or None.
        options: further arguments of the call.
    """
    if base is exact_attention and fast_backend(query.device) == "native":
        from hf_kvcache.attention.prompts import attend_tensors

        if attended := attend_tensors(query, key, value, mask, options):
            return attended
    return base(module, query, key, value, as_tensor(mask), **options)


def eager(module, query, key, value, mask, **options):
    """The model's own eager attention, which adds its mask; without one, everybody sees everything."""
    return compat.eager_attention(module)(module, query, key, value, as_additive(mask, query), **options)


def _check_eager(module, names) -> None:
    """Raise NotImplementedError where the model's own attention would drop an argument, as any function may."""
    unknown = sorted(names - set(signature(compat.eager_attention(module)).parameters))
    if unknown:
        raise NotImplementedError(
            f"{type(module).__name__} calls attention with {', '.join(unknown)}, which neither this library nor the "
            'eager attention of the model acts on; load the model with its own attn_implementation ("sdpa" or "eager")'
        )
