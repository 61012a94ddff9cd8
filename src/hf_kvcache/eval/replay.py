"""One dense prefill, replayed into other caches: what attention handed to their layers, without attention.

Methods whose prefill is exact (`exact_prefill`) see in every layer the rows and queries of the dense model, whatever
they keep of them afterwards. So a text is read once, and each further cache costs what it does with the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from hf_kvcache import compat
from hf_kvcache.adapters.modules import RETAIN_CHILD, attached_heads
from hf_kvcache.attention.call import AttentionCall
from hf_kvcache.cache import KVCache
from hf_kvcache.calibration.observe import Passing, Through
from hf_kvcache.eval.asking import feed
from hf_kvcache.eval.texts import Texts
from hf_kvcache.layer import KVLayer
from hf_kvcache.long_prompts import reads_twice
from hf_kvcache.policies.base import Policy
from hf_kvcache.policies.locret import Locret
from hf_kvcache.policies.wrapper import Wrapper
from hf_kvcache.view import KVView

Result = TypeVar("Result")


class NotReplayed(ValueError):
    """A cache or a model for which there is no replay; says why."""


@dataclass(frozen=True)
class Handed:
    """What the attention of one layer was called with.

    Attributes:
        k, v: rows of the text, `[B, Hkv, T, D]`, keys after RoPE.
        query: `[B, Hq, T, D]` after RoPE.
        mask, module, base, fuses, options: as in `AttentionCall`.
        scores: what the retaining heads of the layer said of the rows, `[B, Hkv, T]`; None where it has none.
    """

    k: torch.Tensor
    v: torch.Tensor
    query: torch.Tensor
    mask: object
    module: torch.nn.Module
    base: Callable
    fuses: bool
    options: dict
    scores: torch.Tensor | None = None

    @classmethod
    def of(cls, call: AttentionCall) -> Handed:
        """What this call was made with, its new rows only."""
        rows, heads = (call.view.new_k, call.view.new_v, call.query), attached_heads(call.view.module)
        scores = None if heads is None else heads.scores().detach()
        return cls(*rows, call.mask, call.module, call.base, call.fuses, call.options, scores)


class _Heads:
    """Stands for an attention module that is not running, whose retaining heads say again what they have said."""

    is_active = True

    def __init__(self, handed: Handed):
        self._handed = handed

    def __getattr__(self, name):
        return self if name == RETAIN_CHILD else getattr(self._handed.module, name)

    def scores(self) -> torch.Tensor:
        return self._handed.scores


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
            self.handed = Handed.of(call)
        super().compress(call)


class _Continuing(KVLayer):
    """A layer that has all rows, and notes what attention over them was called with last."""

    handed: Handed | None = None

    def compress(self, call):
        self.handed = Handed.of(call)
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
    later, logits = overhear(before, lambda cache: feed(model, cache, ids, n_padding))
    return Prefill([_joined(*pair) for pair in zip(before.layers, later, strict=True)], logits)


def overhear(before: Prefill, read: Callable[[KVCache], Result]) -> tuple[list[Handed], Result]:
    """What attention is called with, layer by layer, while `read` feeds tokens to a cache that holds texts."""
    cache = Through(_Continuing)
    replay(before, cache)
    result = read(cache)
    return [layer.handed for layer in cache.layers], result


def _joined(before: Handed, later: Handed) -> Handed:
    """What attention was handed before and in a call after it, as if in one call."""
    ours, theirs = before.options.get("position_ids"), later.options.get("position_ids")
    check_arguments(later)
    if (ours is None) != (theirs is None):
        raise NotReplayed("attention gets positions in some calls only")
    options = before.options if ours is None else before.options | {"position_ids": torch.cat([ours, theirs], -1)}
    mask = None if later.mask is None else later.mask.of_all_tokens()
    names = ("k", "v", "query", *(() if before.scores is None else ("scores",)))
    rows = {name: torch.cat([getattr(x, name) for x in (before, later)], 2) for name in names}
    return replace(before, **rows, mask=mask, options=options)


def first_tokens(prefill: Prefill, n: int) -> Prefill:
    """What a prefill of the first `n` tokens of recorded texts, padding included, would have handed on.

    Its logits are those after all of them.

    Raises:
        NotReplayed: as in `record_on`.
    """
    layers = []
    for handed in prefill.layers:
        check_arguments(handed)
        k, v, query, scores = (
            None if rows is None else rows[:, :, :n] for rows in (handed.k, handed.v, handed.query, handed.scores)
        )
        options, positions = handed.options, handed.options.get("position_ids")
        if positions is not None:
            options = options | {"position_ids": positions[..., :n]}
        mask = None if handed.mask is None else handed.mask.of_first_tokens(n)
        layers.append(replace(handed, k=k, v=v, query=query, mask=mask, options=options, scores=scores))
    return replace(prefill, layers=layers)


def check_arguments(handed: Handed) -> None:
    """Raise `NotReplayed` for arguments about tokens of a call that cannot be told for fewer or more of them."""
    tensors = [
        n for n, x in handed.options.items() if isinstance(x, torch.Tensor) and n not in ("position_ids", "s_aux")
    ]
    if isinstance(handed.mask, torch.Tensor):
        tensors.append("a mask as a tensor")
    if tensors:
        raise NotReplayed(f"attention gets {', '.join(tensors)}")


def check_replay(cache, twice: bool = False) -> None:
    """Raise `NotReplayed` for a cache whose rows depend on more than those of a dense prefill.

    Args:
        cache: any.
        twice: whether its second pass over a text, where it makes one, is seen to (`replay_twice.Recorded`).
    """
    if not isinstance(cache, KVCache):
        return
    if not cache.exact_prefill:
        raise NotReplayed("exact_prefill=False")
    if cache.offloading:
        raise NotReplayed("offloading=True")
    if reads_twice(cache) and not twice:
        raise NotReplayed(f"{type(cache.policy).__name__} reads a text twice")
    policy = cache.policy
    while isinstance(policy, Wrapper):
        policy = policy.scorer
    heard = Policy.on_forward, Locret.on_forward
    if policy is not None and (policy.is_trained or type(policy).on_forward not in heard):
        raise NotReplayed(f"{type(policy).__name__} goes by what happens within the forward pass")


@torch.no_grad()
def replay(prefill: Prefill, cache) -> None:
    """Let an empty cache that `check_replay` has let take a text, and compress it, as in a forward pass."""
    hand_on(prefill.layers, cache)


@torch.no_grad()
def hand_on(layers: list[Handed], cache) -> None:
    """Let a cache take rows, and do what it does after attention to them."""
    for i, handed in enumerate(layers):
        hand_on_layer(handed, cache, i)


@torch.no_grad()
def hand_on_layer(handed: Handed, cache, layer_idx: int) -> None:
    """Let one layer of a cache take rows, and do what it does after attention to them."""
    # a store may adopt the rows that it is given
    view, _ = cache.update(handed.k.clone(), handed.v.clone(), layer_idx)
    if isinstance(view, KVView):
        rest = handed.query, handed.mask, handed.module, handed.base, handed.fuses
        call = AttentionCall(view, *rest, **handed.options)
        view.is_read, view.module = True, call.module if handed.scores is None else _Heads(handed)
        cache.meet(call)
        view.layer.prepare(call)
        view.layer.compress(call)
