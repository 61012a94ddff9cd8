"""What the projections of an attention module produced in the current call, by hooks on the model's own modules."""

from __future__ import annotations

import torch
from torch import nn

from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.shards import WHOLE, Shard, shard_of

FEATURE_POINTS = ("projection", "norm")


def has_norms(attention: nn.Module) -> bool:
    """Whether queries and keys are normalised by modules of their own before RoPE."""
    return all(getattr(attention, name, None) is not None for name in ("q_norm", "k_norm"))


def sources(attention: nn.Module, feature_point: str) -> dict[str, str]:
    """Names of the modules of an attention module that produce queries, keys and values, by "q", "k", "v" or "qkv".

    Raises:
        AdapterError: names those that the attention module lacks.
    """
    if getattr(attention, "qkv_proj", None) is not None:
        names = {"qkv": "qkv_proj"}
    else:
        names = {role: f"{role}_proj" for role in "qkv"}
    if feature_point == "norm":
        names |= {"q": "q_norm", "k": "k_norm"}
    missing = [name for name in names.values() if getattr(attention, name, None) is None]
    if missing:
        layer = f"{type(attention).__name__} of layer {getattr(attention, 'layer_idx', '?')}"
        raise AdapterError(f"{layer} has no {', '.join(missing)}, whose outputs retaining heads look at")
    return names


class Capture:
    """References to the outputs of an attention module's projections, from `arm` to `drop`.

    Nothing is computed until somebody asks. The modules are looked up whenever a call begins, so that a projection
    which PEFT has wrapped or unwrapped since is followed.

    Attributes:
        attention: the module, from `arm` to `drop`.
    """

    def __init__(self):
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._ids: dict[str, int] = {}
        self._seen: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {}
        self._is_armed = False
        self.attention: nn.Module | None = None

    def watch(self, attention: nn.Module, names: dict[str, str]) -> None:
        """Have hooks on these modules (from `sources`) of an attention module, and on no others."""
        modules = {role: getattr(attention, name) for role, name in names.items()}
        # ids rather than handles, which torch.compile cannot look into
        if len(modules) == len(self._ids) and all(self._ids.get(i) in m._forward_hooks for i, m in modules.items()):
            return
        self.release()
        for role, module in modules.items():
            self._handles.append(module.register_forward_hook(getattr(self, f"_take_{role}")))
            self._ids[role] = self._handles[-1].id

    def arm(self, attention: nn.Module) -> None:
        """A call of the attention module begins."""
        self.drop()
        self._is_armed, self.attention = True, attention

    def drop(self) -> None:
        """It is over: forget what was seen, and look at nothing until the next one."""
        self._seen, self._is_armed, self.attention = {}, False, None

    def release(self) -> None:
        """Take all hooks off."""
        self.drop()
        for handle in self._handles:
            handle.remove()
        self._handles, self._ids = [], {}

    def parts(self) -> list[torch.Tensor]:
        """What the features of the tokens of this call consist of: queries, keys and values, each `[B, S, ...]`.

        In this order, in the model's dtype; one tensor where the model has them in one already, none before all are
        there. With the graph of the projections, if there is one and gradients are enabled.
        """
        if not self._seen or self._seen.keys() != self._ids.keys():
            return []
        fused = "qkv" in self._seen
        last = self._seen["qkv" if fused else "v"][0]
        if self._seen.keys() == {"qkv"}:
            parts = [last]
        else:
            q, k = (_rows(*self._seen[role], n_tokens=last.shape[1]) for role in "qk")
            parts = [q, k, last[..., q.shape[-1] + k.shape[-1] :] if fused else last]
        return parts if torch.is_grad_enabled() else [part.detach() for part in parts]

    def parts_of_all_heads(self, n_features: int) -> tuple[list[torch.Tensor], Shard]:
        """The same where each of several processes computes some of the heads, and which heads are this one's.

        Args:
            n_features: channels of all heads together. What other processes computed comes without its graph.
        """
        parts = self.parts()
        if not parts:
            return [], WHOLE
        shard = shard_of(self.attention, n_features // sum(part.shape[-1] for part in parts))
        return [shard.all_heads(part, -1) for part in parts], shard

    # -- hooks: methods, so that copies of a model get their own ------------------------------------------------------

    def _take(self, role, inputs, output) -> None:
        if self._is_armed:
            self._seen[role] = output, (inputs[0] if inputs else output).stride()

    def _take_q(self, module, inputs, output) -> None:
        self._take("q", inputs, output)

    def _take_k(self, module, inputs, output) -> None:
        self._take("k", inputs, output)

    def _take_v(self, module, inputs, output) -> None:
        self._take("v", inputs, output)

    def _take_qkv(self, module, inputs, output) -> None:
        self._take("qkv", inputs, output)

    def __getstate__(self):
        # activations are neither copied nor pickled
        return vars(self) | {"_seen": {}, "_is_armed": False, "attention": None}


def _rows(t: torch.Tensor, strides: tuple[int, ...], n_tokens: int) -> torch.Tensor:
    """`[B, S, H * D]` of what a projection or a norm gave: that, `[B, S, H, D]`, or `[B, H, S, D]`."""
    if t.dim() == 3:
        return t
    is_heads_first = t.shape[1] != n_tokens
    if t.shape[1] == t.shape[2]:
        # a norm's input is a view of what a projection wrote, token after token
        is_heads_first = strides[1] < strides[2]
    return (t.transpose(1, 2) if is_heads_first else t).flatten(2)
