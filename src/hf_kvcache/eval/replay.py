"""One dense prefill, replayed into other caches: what attention handed to their layers, without attention.

Methods whose prefill is exact (`exact_prefill`) see in every layer the rows and queries of the dense model, whatever
they keep of them afterwards. So a text is read once, and each further cache costs what it does with the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hf_kvcache import compat
from hf_kvcache.attention.call import AttentionCall
from hf_kvcache.cache import KVCache
from hf_kvcache.calibration.observe import Passing, Through
from hf_kvcache.eval.asking import feed
from hf_kvcache.eval.texts import Texts
from hf_kvcache.layer import KVLayer
from hf_kvcache.long_prompts import reads_twice
from hf_kvcache.policies.base import Policy
from hf_kvcache.policies.wrapper import Wrapper
from hf_kvcache.view import KVView


class NotReplayed(ValueError):
    """A cache or a model for which there is no replay; says why."""


@dataclass(frozen=True)
class Handed:
    """What the attention of one layer was called with.

    Attributes:
        k, v: rows of the text, `[B, Hkv, T, D]`, keys after RoPE.
        query: `[B, Hq, T, D]` after RoPE.
        mask, module, base, fuses, options: as in `AttentionCall`.
    """

    k: torch.Tensor
    v: torch.Tensor
    query: torch.Tensor
    mask: object
    module: torch.nn.Module
    base: Callable
    fuses: bool
    options: dict


@dataclass(frozen=True)
class Prefill:
    """Texts that a model has read together, kept in memory.

    Attributes:
        layers: of all layers, in their order.
        logits: `[B, vocab]` after the last token.
    """

    layers: list[Handed]
    logits: torch.Tensor


class _Recording(Passing):
    """A layer that keeps no rows, but what attention was called with."""

    needs_model = False
    handed: Handed | None = None

    def append(self, k, v):
        # as a layer hands them to attention at prefill
        return super().append(k.contiguous(), v.contiguous())

    def prepare(self, call):
        pass

    def compress(self, call):
        if call.query is not None:
            rest = call.query, call.mask, call.module, call.base, call.fuses, call.options
            self.handed = Handed(call.view.new_k, call.view.new_v, *rest)
        super().compress(call)


class _Continuing(KVLayer):
    """A layer that has all rows, and notes what attention over them was called with last."""

    call: AttentionCall | None = None

    def compress(self, call):
        self.call = call
        super().compress(call)


def record(model, texts: Texts) -> Prefill:
    """Read texts once.

    Raises:
        NotReplayed: the model has layers that are not of full attention, or hands attention something else than rows.
    """
    config = model.config
    if any(layer is not None for layer in compat.hf_layers(config)) or compat.n_states(config):
        raise NotReplayed("not all layers of this model have full attention")
    recorder = Through(_Recording)
    logits = feed(model, recorder, texts.ids, texts.n_padding)
    handed = [getattr(layer, "handed", None) for layer in recorder.layers]
    if None in handed:
        raise NotReplayed("this model computes with rows before attention gets them")
    return Prefill(handed, logits)


def record_on(model, before: Prefill, ids: torch.Tensor, n_padding: torch.Tensor | None = None) -> Prefill:
    """Read on from texts that have been recorded: what a prefill of all would have handed on, up to rounding.

    Args:
        model: as in `record`.
        before: the texts so far, which stays as it is.
        ids: what comes next, `[B, S]`.
        n_padding: of the texts, as in `Texts`.

    Raises:
        NotReplayed: attention got arguments about the tokens of a call that this function does not know.
    """
    cache = Through(_Continuing)
    replay(before, cache)
    logits = feed(model, cache, ids, n_padding)
    return Prefill([_joined(old, layer.call) for old, layer in zip(before.layers, cache.layers, strict=True)], logits)


def _joined(before: Handed, call: AttentionCall) -> Handed:
    """What attention was handed before and in a call after it, as if in one call."""
    ours, theirs = before.options.get("position_ids"), call.position_ids
    unknown = [n for n, x in call.options.items() if isinstance(x, torch.Tensor) and n not in ("position_ids", "s_aux")]
    if unknown or isinstance(call.mask, torch.Tensor) or (ours is None) != (theirs is None):
        raise NotReplayed(f"attention gets {', '.join(unknown or ['a mask as a tensor'])}")
    options = before.options if ours is None else before.options | {"position_ids": torch.cat([ours, theirs], -1)}
    mask = None if call.mask is None else call.mask.of_all_tokens()
    rows = (before.k, call.view.new_k), (before.v, call.view.new_v), (before.query, call.query)
    k, v, query = (torch.cat(pair, 2) for pair in rows)
    return replace(before, k=k, v=v, query=query, mask=mask, options=options)


def check_replay(cache) -> None:
    """Raise `NotReplayed` for a cache whose rows depend on more than those of a dense prefill."""
    if not isinstance(cache, KVCache):
        return
    if not cache.exact_prefill:
        raise NotReplayed("exact_prefill=False")
    if cache.offloading:
        raise NotReplayed("offloading=True")
    if reads_twice(cache):
        raise NotReplayed(f"{type(cache.policy).__name__} reads a text twice")
    policy = cache.policy
    while isinstance(policy, Wrapper):
        policy = policy.scorer
    if policy is not None and (policy.is_trained or type(policy).on_forward is not Policy.on_forward):
        raise NotReplayed(f"{type(policy).__name__} goes by what happens within the forward pass")


@torch.no_grad()
def replay(prefill: Prefill, cache) -> None:
    """Let an empty cache that `check_replay` has let take a text, and compress it, as in a forward pass."""
    for i, handed in enumerate(prefill.layers):
        # a store may adopt the rows that it is given
        view, _ = cache.update(handed.k.clone(), handed.v.clone(), i)
        if isinstance(view, KVView):
            rest = handed.query, handed.mask, handed.module, handed.base, handed.fuses
            call = AttentionCall(view, *rest, **handed.options)
            view.is_read, view.module = True, call.module
            cache.meet(call)
            view.layer.prepare(call)
            view.layer.compress(call)
