"""What the projections of an attention module produced in the current call, by hooks on the model's own modules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hf_kvcache.adapters.calls import Calls
from hf_kvcache.adapters.watching import Watch
from hf_kvcache.sharded_model import shard_of
from hf_kvcache.shards import Shard


class _Call:
    """One call of an attention module: outputs of its projections, and the strides of what they were made from."""

    def __init__(self, attention: nn.Module):
        self.attention = attention
        self.seen: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {}


class Capture:
    """References to the outputs of an attention module's projections while it runs, thread by thread.

    Nothing is computed until somebody asks. The modules are looked up whenever a call begins, so that a projection
    which PEFT has wrapped or unwrapped since is followed.

    Args:
        names: of the modules to look at (from `sources`), asked for when a call begins; None if at none.
    """

    def __init__(self, names: Callable[[], dict[str, str] | None]):
        self._names, self._watch, self._calls = names, Watch(), Calls()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def hang(self, attention: nn.Module, names: dict[str, str]) -> None:
        """Look at the calls of this attention module from now on, and at these of its modules first."""
        if not self._handles:
            self._handles = [
                attention.register_forward_pre_hook(self._before),
                attention.register_forward_hook(self._after, always_call=True),
            ]
        self._follow(attention, names)

    def release(self) -> None:
        """Take all hooks off."""
        self._watch.release()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _follow(self, attention: nn.Module, names: dict[str, str]) -> None:
        """Have hooks on these modules, and on no others."""
        modules = {role: getattr(attention, name) for role, name in names.items()}
        hooks = {"q": self._take_q, "k": self._take_k, "v": self._take_v, "qkv": self._take_qkv}
        self._watch.follow(modules, hooks)

    def parts(self) -> list[torch.Tensor]:
        """What the features of the tokens of this call consist of: queries, keys and values, each `[B, S, ...]`.

        In this order, in the model's dtype; one tensor where the model has them in one already, none before all are
        there. With the graph of the projections, if there is one and gradients are enabled.
        """
        call = self._calls.now
        if call is None or not call.seen or call.seen.keys() != self._watch.roles:
            return []
        seen, fused = call.seen, "qkv" in call.seen
        last = seen["qkv" if fused else "v"][0]
        if seen.keys() == {"qkv"}:
            parts = [last]
        else:
            q, k = (_rows(*seen[role], n_tokens=last.shape[1]) for role in "qk")
            parts = [q, k, last[..., q.shape[-1] + k.shape[-1] :] if fused else last]
        return parts if torch.is_grad_enabled() else [part.detach() for part in parts]

    def parts_of_all_heads(self, n_features: int) -> tuple[list[torch.Tensor], Shard]:
        """The same where each of several processes computes some of the heads, and which heads are this one's.

        Args:
            n_features: channels of all heads together. What other processes computed comes without its graph.

        Raises:
            RuntimeError: the attention module is not running, or its projections have not run yet.
        """
        parts = self.parts()
        if not parts:
            raise RuntimeError(
                "no features have been captured: scores and features are there only while the attention module runs, "
                "after its projections (a hook on the module needs prepend=True)"
            )
        shard = shard_of(self._calls.now.attention, n_features // sum(part.shape[-1] for part in parts))
        return [shard.all_heads(part, -1) for part in parts], shard

    # -- hooks: methods, so that copies of a model get their own ------------------------------------------------------

    def _before(self, attention: nn.Module, args) -> None:
        names = self._names()
        # a call that nobody looks at is one, too
        self._calls.begin(None if names is None else _Call(attention))
        if names is not None:
            self._follow(attention, names)

    def _after(self, attention: nn.Module, args, output) -> None:
        self._calls.end()

    def _take(self, role, inputs, output) -> None:
        call = self._calls.now
        if call is not None:
            call.seen[role] = output, (inputs[0] if inputs else output).stride()

    def _take_q(self, module, inputs, output) -> None:
        self._take("q", inputs, output)

    def _take_k(self, module, inputs, output) -> None:
        self._take("k", inputs, output)

    def _take_v(self, module, inputs, output) -> None:
        self._take("v", inputs, output)

    def _take_qkv(self, module, inputs, output) -> None:
        self._take("qkv", inputs, output)


def _rows(t: torch.Tensor, strides: tuple[int, ...], n_tokens: int) -> torch.Tensor:
    """`[B, S, H * D]` of what a projection or a norm gave: that, `[B, S, H, D]`, or `[B, H, S, D]`."""
    if t.dim() == 3:
        return t
    is_heads_first = t.shape[1] != n_tokens
    if t.shape[1] == t.shape[2]:
        # a norm's input is a view of what a projection wrote, token after token
        is_heads_first = strides[1] < strides[2]
    return (t.transpose(1, 2) if is_heads_first else t).flatten(2)
