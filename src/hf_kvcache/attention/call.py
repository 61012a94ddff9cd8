"""One call of an attention function: what the model asks for, and what this library acts on of it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_kvcache import compat
from hf_kvcache.attention.mask import KVMask

# what the ops of this library act on, beside what needs no action
SERVED = compat.HARMLESS_ARGUMENTS | {"dropout", "scaling", "softcap", "s_aux", "is_causal"}
# what needs no look at its value
_PLAIN = SERVED - {"s_aux"}


class AttentionCall:
    """One call of attention over the rows of a layer, made by the attention function and handed to the layer.

    Args:
        view: the `KVView` that is read.
        query: `[B, Hq, S, D]` after RoPE, or None where queries do not fit the rows (latents).
        mask: a `KVMask`, a tensor, or None, about all tokens that the layer has seen.
        module: the attention module.
        base: the attention function that reads tensors; it is called where the ops of this library are not.
        fuses: whether those ops may be used instead of `base`.
        options: further arguments of the call, as the model gave them.

    Attributes:
        n_new: tokens of this call, `S`.
        position_ids: `[B | 1, S]`, or None where the model does not say.
        scaling: factor on the scores.
        softcap, sinks: of the scores; sinks are `[Hq]`.
        unserved: names of arguments that the ops do not act on and that ask for something.
        sees_all: whether this is one token in a text without padding, which sees every row that is kept.
    """

    __slots__ = (
        "view",
        "query",
        "mask",
        "module",
        "base",
        "fuses",
        "options",
        "n_new",
        "position_ids",
        "scaling",
        "softcap",
        "sinks",
        "unserved",
        "sees_all",
    )

    def __init__(
        self,
        view,
        query: torch.Tensor | None,
        mask=None,
        module: torch.nn.Module | None = None,
        base: Callable | None = None,
        fuses: bool = True,
        **options,
    ):
        if query is not None and query.dtype != view.new_k.dtype:
            # autocast leaves queries in float32 after RoPE
            query = query.to(view.new_k.dtype)
        self.view, self.query, self.mask, self.module = view, query, mask, module
        self.base, self.fuses, self.options = base, fuses, options
        self.n_new = view.new_k.shape[2]
        self.position_ids, self.softcap = options.get("position_ids"), options.get("softcap")
        self.sinks, scaling = options.get("s_aux"), options.get("scaling")
        if scaling is None:
            scaling = (view.new_k if query is None else query).shape[-1] ** -0.5
        self.scaling = scaling
        is_causal = mask is None or (type(mask) is KVMask and mask.is_causal and mask.padding is None)
        self.sees_all = self.n_new == 1 and is_causal and not view.layer.has_padding
        # most models pass nothing else
        is_plain = options.keys() <= _PLAIN and options.get("is_causal") is not False
        self.unserved = [] if is_plain else unserved(query, options)

    @property
    def is_real(self) -> torch.Tensor | None:
        """Which of the new tokens are no padding, boolean `[B, S]`; None when all are."""
        from hf_kvcache.attention.padding import new_token_padding

        return new_token_padding(self.mask, self.n_new, self.view.layer.tokens_seen)

    @property
    def real_before(self) -> torch.Tensor | None:
        """How many real tokens stand before each new one, int64 `[B, S]`; None where no padding is known of."""
        from hf_kvcache.attention.padding import real_before

        return real_before(self.mask, self.n_new, self.view.layer.tokens_seen)

    def with_tensors(self, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None):
        """`base` over tensors `[B, Hkv, N, D]`: the output `[B, S, Hq, D]`, and attention weights or None."""
        return self.base(self.module, self.query, key, value, mask, **self.options)


def unserved(query: torch.Tensor | None, options: dict) -> list[str]:
    """Arguments of an attention call that the ops of this library do not act on, and that ask for something.

    Args:
        query: `[B, Hq, S, D]`, or None where the number of heads does not matter.
        options: arguments of the call.
    """
    asked = [n for n in options.keys() - SERVED if options[n] is not None and options[n] is not False]
    if options.get("is_causal") is False:
        asked.append("is_causal")
    sinks = options.get("s_aux")
    if sinks is not None and query is not None and sinks.shape != query.shape[1:2]:
        asked.append("s_aux")
    return asked


def as_tensor(mask) -> torch.Tensor | None:
    """A mask for a function that knows tensors only."""
    return mask.dense() if isinstance(mask, KVMask) else mask
