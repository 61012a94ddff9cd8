"""What a retrofit does inside an attention module: read decisions, take the channel out, merge before RoPE.

Hooks replace the outputs of the model's own projections, so that no forward is copied and the model itself rotates a
running mean by the position of its last member.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from hf_kvcache.adapters.capture import has_norms, sources
from hf_kvcache.adapters.modules import attentions
from hf_kvcache.attention.interface import register_pass_throughs
from hf_kvcache.attention.mask import new_token_padding
from hf_kvcache.dmc.decisions import decide, harden, opens, relax
from hf_kvcache.dmc.merging import merge
from hf_kvcache.dmc.settings import Settings
from hf_kvcache.shards import WHOLE, Shard, is_sharded, shard_of

if TYPE_CHECKING:
    from hf_kvcache.slots import SlotLayer


class Owner(Protocol):
    """What carries the hooks: a `Retrofit` or its PEFT form.

    Attributes:
        is_active: whether there is a retrofit and it is not disabled.
        compresses: False takes the channel out and does nothing else: what a teacher is, and what training starts from.
        settings: of the retrofit in use.
        training: relaxed decisions or hard ones.
        noise: logistic noise `[B, Hkv, S]` for relaxed decisions, or None.
        fade: factor on the borrowed channel, which is 0 but in the first phase of training.
    """

    is_active: bool
    compresses: bool
    settings: Settings
    training: bool
    noise: torch.Tensor | None
    fade: float

    def rows(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights `[Hkv, hidden]` of decisions and importance, where decisions are not borrowed."""


class Call:
    """One call of an attention module.

    Attributes:
        settings: of the retrofit.
        layer: the cache's layer that takes the rows, or None without a cache.
        is_real: which tokens are no padding, `[B, S]`; None when all are.
        logits: `[B, Hkv, S]`.
        omega: `[B, Hkv, S]`, or None for DMS.
        p, left: relaxed decisions, and the log of what they leave, `[B, Hkv, S]`; hard ones (0 and 1) and None.
        alpha: hard decisions, boolean `[B, Hkv, S]`.
        is_relaxed: whether `p` is.
        n_merged: how many of keys and values a cache has merged.
    """

    def __init__(self, settings: Settings, layer: SlotLayer | None, is_real: torch.Tensor | None, is_relaxed: bool):
        self.settings, self.layer, self.is_real, self.is_relaxed = settings, layer, is_real, is_relaxed
        self.logits = self.omega = self.p = self.left = self.alpha = None
        self.n_merged = 0

    def resolve(self, decision, importance, noise, shard: Shard = WHOLE) -> None:
        """Make decisions of raw values `[B, Hkv, S]`."""
        self.logits, self.omega = decide(self.settings, decision, importance, shard)
        opening = None
        if self.layer is None or self.is_real is not None or not self.layer.all_begun:
            opening = opens(self.logits, self.is_real, None if self.layer is None else self.layer.has_begun)
        self.alpha = harden(self.logits.detach(), opening)
        if not self.is_relaxed:
            self.p, self.left = self.alpha, None
            return
        p, left = relax(self.logits, noise, self.settings.tau)
        self.p, self.left = p.masked_fill(opening, 0.0), left.masked_fill(opening, 0.0)

    def merged(self, x: torch.Tensor, side: str) -> torch.Tensor:
        """Running means of `[B, S, Hkv, D]`, for DMC."""
        if not self.settings.merges:
            return x
        if self.layer is not None:
            return self.layer.merge(side, x, self)
        return merge(x.transpose(1, 2), self.omega, self.p, self.settings.window).transpose(1, 2)


class Hooks:
    """The hooks of one attention module.

    Args:
        owner: whose they are.
    """

    trains = True  # whether there are relaxed decisions: not in the repository of a model

    def __init__(self, owner: Owner):
        self.owner = owner
        self.call: Call | None = None
        self._on_attention: list[torch.utils.hooks.RemovableHandle] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._ids: dict[str, int] = {}
        self._attention: nn.Module | None = None
        self._raw: tuple[torch.Tensor | None, ...] | None = None
        self._query: torch.Tensor | None = None
        self._keep: tuple | None = None
        self._served: str | None = None

    def hang(self, attention: nn.Module) -> None:
        """Put the hooks on an attention module (once)."""
        if not self._on_attention:
            self._on_attention = [attention.register_forward_pre_hook(self._before, with_kwargs=True)]
            seen = attentions(attention)[attention.layer_idx]
            self._n_kv_heads, self._head_dim = seen.n_kv_heads, seen.head_dim
            self._n_groups = attention.num_key_value_groups
            self._arguments = list(signature(attention.forward).parameters)
            self._names = sources(attention, "norm" if has_norms(attention) else "projection")
            self._watch(attention)

    def remove(self) -> None:
        for handle in self._handles + self._on_attention:
            handle.remove()
        self._handles, self._on_attention, self._ids, self.call = [], [], {}, None

    def _watch(self, attention: nn.Module) -> None:
        """Follow the projections: PEFT may have wrapped or unwrapped one since."""
        modules = {role: getattr(attention, name) for role, name in self._names.items()}
        if len(modules) == len(self._ids) and all(self._ids.get(i) in m._forward_hooks for i, m in modules.items()):
            return
        for handle in self._handles:
            handle.remove()
        self._handles, self._ids = [], {}
        for role, module in modules.items():
            self._handles.append(module.register_forward_hook(getattr(self, f"_on_{role}")))
            self._ids[role] = self._handles[-1].id

    # -- hooks: methods, so that copies of a model get their own ------------------------------------------------------

    def _before(self, attention: nn.Module, args, kwargs) -> None:
        from hf_kvcache.slots import layer_of

        self.call = self._query = self._raw = None
        self._attention, owner = attention, self.owner
        if not owner.is_active:
            return
        self._watch(attention)
        if attention.config._attn_implementation != self._served:
            # a function that was registered since would know nothing of decisions
            register_pass_throughs()
            self._served = attention.config._attn_implementation
        given = dict(zip(self._arguments, args)) | kwargs
        hidden, mask = given["hidden_states"], given.get("attention_mask")
        S, settings = hidden.shape[1], owner.settings
        if not owner.compresses:
            self.call = Call(settings, None, None, False)
            return
        layer = layer_of(given.get("past_key_values"), attention, settings)
        n_seen = (layer.tokens_seen if layer is not None else 0) + S
        # a decoded token is no padding, which stands before the first real one; a GPU would have to be waited for
        is_decoded = layer is not None and S == 1 and layer.all_begun
        is_real = None
        if not is_decoded or hidden.device.type == "cpu":
            is_real = new_token_padding(mask, S, n_seen)
            if layer is not None:
                layer.refuse_gaps(is_real)
        is_real = None if is_decoded else is_real
        self.call = Call(settings, layer, is_real, owner.training)
        if owner.training and (layer is not None or not self.trains):
            raise RuntimeError(
                "relaxed decisions are for training, without a cache, which takes hf_kvcache itself; "
                "call model.eval() to generate"
            )
        if settings.decision != "borrowed":
            self._raw = tuple(None if w is None else self._project(hidden, w) for w in owner.rows())
            if not is_sharded(attention):
                self._decide(self._n_kv_heads)

    @staticmethod
    def _project(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, weight.to(hidden.dtype)).transpose(1, 2)  # [B, Hkv, S]

    def _decide(self, n_kv_heads: int) -> None:
        """Decisions that are not borrowed are made for all heads; of several processes, each takes its own."""
        if self._raw is not None:
            shard = self._shard(n_kv_heads)
            own = [None if x is None else shard.own(x, 1) for x in self._raw]
            self._raw = None
            self._resolve(*own)

    def _shard(self, n_kv_heads: int) -> Shard:
        return shard_of(self._attention, self._n_kv_heads // n_kv_heads)

    def _resolve(self, decision, importance) -> None:
        self.call.resolve(decision, importance, self.owner.noise, self._shard(decision.shape[1]))
        if self.call.layer is not None:
            self.call.layer.begin(self.call)

    def _on_q(self, module, inputs, output):
        if self.call is None:
            return None
        return _through(output, inputs, self._head_dim, self._queries)

    def _on_k(self, module, inputs, output):
        if self.call is None:
            return None
        return _through(output, inputs, self._head_dim, self._keys)

    def _on_v(self, module, inputs, output):
        if self.call is None or not self.owner.compresses or not self.call.settings.merges:
            return None
        return _through(output, inputs, self._head_dim, self._values)

    def _on_qkv(self, module, inputs, output):
        """Projections in one; norms after it bring their own hooks for queries and keys."""
        if self.call is None:
            return None
        n_kv = output.shape[-1] // (self._n_groups + 2)
        q, k, v = output.split([output.shape[-1] - 2 * n_kv, n_kv, n_kv], -1)
        if "q" not in self._names:
            q, k = self._on_q(module, inputs, q), self._on_k(module, inputs, k)
        changed = self._on_v(module, inputs, v)
        return torch.cat([q, k, v if changed is None else changed], -1)

    # -- on [B, S, H, D] ---------------------------------------------------------------------------------------------

    def _queries(self, q: torch.Tensor) -> torch.Tensor:
        settings = self.call.settings
        self._decide(q.shape[2] // self._n_groups)
        if not settings.ablates:
            return q
        grouped = q.unflatten(2, (-1, self._n_groups))  # [B, S, Hkv, G, D]
        if settings.merges:
            self._query = grouped[..., settings.neuron].mean(-1)
            return self._without(q)
        # the first query head of a group decides; the others keep all their channels
        self._query = grouped[..., 0, settings.neuron]
        if self.owner.compresses and settings.decision == "borrowed":
            self._resolve(self._query.transpose(1, 2), None)
        return torch.cat([self._without(grouped[..., :1, :]), grouped[..., 1:, :]], -2).flatten(2, 3)

    def _keys(self, k: torch.Tensor) -> torch.Tensor:
        call, settings = self.call, self.call.settings
        self._decide(k.shape[2])
        if not settings.merges:
            return k
        if self.owner.compresses and settings.decision == "borrowed":
            if self._query is None:
                raise RuntimeError(_ORDER.format("keys before queries"))
            self._resolve(k[..., settings.neuron].transpose(1, 2), self._query.transpose(1, 2))
        k = self._without(k) if settings.ablates else k
        return call.merged(k, "k") if self.owner.compresses else k

    def _values(self, v: torch.Tensor) -> torch.Tensor:
        self._decide(v.shape[2])
        if self.call.p is None:
            raise RuntimeError(_ORDER.format("values before keys are normalised"))
        return self.call.merged(v, "v")

    def _without(self, x: torch.Tensor) -> torch.Tensor:
        """The borrowed channel, faded out."""
        # what inference mode makes cannot be trained with
        key = x.dtype, x.device, self.call.settings.neuron, self.owner.fade, torch.is_inference_mode_enabled()
        if self._keep is None or self._keep[0] != key:
            keep = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
            keep[self.call.settings.neuron] = self.owner.fade
            self._keep = key, keep
        return x * self._keep[1]

    def __getstate__(self):
        # activations are neither copied nor pickled
        return vars(self) | {"call": None, "_query": None, "_raw": None, "_attention": None}


_ORDER = 'this model computes {}, so decisions cannot be read in time; use decision="linear"'


def _through(output: torch.Tensor, inputs, head_dim: int, change) -> torch.Tensor:
    """Apply `change` on `[B, S, H, D]` to what a projection or a norm gave, in whichever layout."""
    if output.dim() == 3:
        return change(output.unflatten(-1, (-1, head_dim))).flatten(-2)
    # a norm's input is a view of what a projection wrote, token after token
    strides = (inputs[0] if inputs else output).stride()
    if strides[1] < strides[2]:
        return change(output.transpose(1, 2)).transpose(1, 2)
    return change(output)
