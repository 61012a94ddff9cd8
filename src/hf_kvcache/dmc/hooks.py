"""What a retrofit does inside an attention module: read decisions, take the channel out, merge before RoPE.

Hooks replace the outputs of the model's own projections, so that no forward is copied and the model itself rotates a
running mean by the position of its last member.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from hf_kvcache import compat
from hf_kvcache.adapters.calls import Calls
from hf_kvcache.adapters.modules import attentions
from hf_kvcache.adapters.projections import has_norms, sources
from hf_kvcache.adapters.watching import Watch
from hf_kvcache.attention.guest import Guest
from hf_kvcache.attention.known import register_pass_throughs
from hf_kvcache.attention.padding import new_token_padding
from hf_kvcache.dmc.attention import attend_text
from hf_kvcache.dmc.decisions import decide, harden, opens, relax
from hf_kvcache.dmc.merging import merge
from hf_kvcache.dmc.settings import Settings
from hf_kvcache.sharded_model import is_sharded, shard_of
from hf_kvcache.shards import WHOLE, Shard

if TYPE_CHECKING:
    from hf_kvcache.dmc.layer import TrainedLayer


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


class Deciding(Guest):
    """Mixed into an `Owner`: it attends without a cache, and a thread can put it off for itself (`Hooks.n_off`)."""

    _compresses = True

    def attend_tensors(self, *args):
        return attend_text(self, *args)

    @property
    def compresses(self) -> bool:
        return self._compresses and not self.hooks.n_off

    @compresses.setter
    def compresses(self, value: bool) -> None:
        self._compresses = value


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
        first: where every row begins, int64 `[B]` on the CPU, as the mask of a cache has it.
        n_merged: how many of keys and values a cache has merged.
        n_appended: tokens that its layer has counted, but not taken in yet.
        open_segment: what a cache's layer will know of its open segment once it has taken the rows, by name.
        compresses: see `Owner`.
        attention: the module, while it runs.
        raw, query: values that decisions will be made of, until they are: those of all heads that `rows` gives, and
            the channel borrowed from queries.
    """

    def __init__(self, settings: Settings, layer: TrainedLayer | None, is_real: torch.Tensor | None, is_relaxed: bool):
        self.settings, self.layer, self.is_real, self.is_relaxed = settings, layer, is_real, is_relaxed
        self.logits = self.omega = self.p = self.left = self.alpha = None
        self.n_merged = self.n_appended = 0
        self.first: torch.Tensor | None = None
        self.open_segment: dict[str, torch.Tensor] = {}
        self.compresses = True
        self.attention: nn.Module | None = None
        self.raw: tuple[torch.Tensor | None, ...] | None = None
        self.query: torch.Tensor | None = None

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
    """The hooks of one attention module. What they see of a call lies in a `Call`, of which every thread has its own.

    Args:
        owner: whose they are.
    """

    def __init__(self, owner: Owner):
        self.owner = owner
        self._calls, self._watch = Calls(), Watch()
        self._on_attention: list[torch.utils.hooks.RemovableHandle] = []
        self._keep: tuple | None = None
        self._served: str | None = None

    @property
    def call(self) -> Call | None:
        """The newest call that has begun or ended in this thread; None if nothing was decided in it."""
        return self._calls.newest

    @property
    def running(self) -> Call | None:
        """The call that is under way in this thread."""
        return self._calls.now

    @property
    def n_off(self) -> int:
        """How many blocks without compression this thread is in."""
        return self._calls.n_off

    @n_off.setter
    def n_off(self, n: int) -> None:
        self._calls.n_off = n

    def hang(self, attention: nn.Module) -> None:
        """Put the hooks on an attention module (once)."""
        if not self._on_attention:
            self._on_attention = [
                attention.register_forward_pre_hook(self._before, with_kwargs=True),
                attention.register_forward_hook(self._after, always_call=True),
            ]
            seen = attentions(attention)[attention.layer_idx]
            self._n_kv_heads, self._head_dim = seen.n_kv_heads, seen.head_dim
            self._n_groups = attention.num_key_value_groups
            self._arguments = list(signature(attention.forward).parameters)
            self._names = sources(attention, "norm" if has_norms(attention) else "projection")
            self._follow(attention)

    def remove(self) -> None:
        self._watch.release()
        for handle in self._on_attention:
            handle.remove()
        self._on_attention, self._calls.newest = [], None

    def _follow(self, attention: nn.Module) -> None:
        """Hook the projections: PEFT may have wrapped or unwrapped one since."""
        modules = {role: getattr(attention, name) for role, name in self._names.items()}
        self._watch.follow(modules, {"q": self._on_q, "k": self._on_k, "v": self._on_v, "qkv": self._on_qkv})

    # -- hooks: methods, so that copies of a model get their own ------------------------------------------------------

    def _before(self, attention: nn.Module, args, kwargs) -> None:
        owner = self.owner
        call = Call(owner.settings, None, None, False) if owner.is_active else None
        self._calls.begin(call)
        self._calls.newest = call
        if call is None:
            return
        call.attention, call.compresses = attention, owner.compresses
        self._follow(attention)
        if attention.config._attn_implementation != self._served:
            # a function that was registered since would know nothing of decisions
            register_pass_throughs()
            self._served = attention.config._attn_implementation
        if call.compresses:
            self._begin(call, attention, dict(zip(self._arguments, args)) | kwargs)

    def _begin(self, call: Call, attention: nn.Module, given: dict) -> None:
        """Find the rows of the past and what is padding; decide, where that takes nothing but the input."""
        from hf_kvcache.dmc.layer import layer_of

        owner, hidden = self.owner, given["hidden_states"]
        mask, S, settings = given.get("attention_mask"), hidden.shape[1], call.settings
        call.layer = layer_of(compat.given_cache(given), attention, settings)
        call.is_relaxed = owner.training
        if call.layer is None:
            call.is_real = new_token_padding(mask, S, S)
        else:
            call.layer.read_mask(mask, call, *hidden.shape[:2], hidden.device)
        if owner.training and call.layer is not None:
            raise RuntimeError(
                "relaxed decisions are for training, without a cache, which takes hf_kvcache itself; "
                "call model.eval() to generate"
            )
        if settings.decision != "borrowed":
            call.raw = tuple(None if w is None else self._project(hidden, w) for w in owner.rows())
            if not is_sharded(attention):
                self._decide(call, self._n_kv_heads)

    def _after(self, attention: nn.Module, args, output) -> None:
        call = self._calls.end()
        self._calls.newest = call
        if call is not None:
            call.attention = call.raw = call.query = None
            layer, call.layer = call.layer, None
            if layer is not None:
                # an exception between here and there must not leave half of a token
                layer.abandon(call)

    @staticmethod
    def _project(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, weight.to(hidden.dtype)).transpose(1, 2)  # [B, Hkv, S]

    def _decide(self, call: Call, n_kv_heads: int) -> None:
        """Decisions that are not borrowed are made for all heads; of several processes, each takes its own."""
        if call.raw is not None:
            shard = self._shard(call, n_kv_heads)
            own = [None if x is None else shard.local_shard(x, 1) for x in call.raw]
            call.raw = None
            self._resolve(call, *own)

    def _shard(self, call: Call, n_kv_heads: int) -> Shard:
        return shard_of(call.attention, self._n_kv_heads // n_kv_heads)

    def _resolve(self, call: Call, decision, importance) -> None:
        call.resolve(decision, importance, self.owner.noise, self._shard(call, decision.shape[1]))
        if call.layer is not None:
            call.layer.start_call(call)

    def _on_q(self, module, inputs, output):
        if self.running is None:
            return None
        return _through(output, inputs, self._head_dim, self._queries)

    def _on_k(self, module, inputs, output):
        if self.running is None:
            return None
        return _through(output, inputs, self._head_dim, self._keys)

    def _on_v(self, module, inputs, output):
        call = self.running
        if call is None or not call.compresses or not call.settings.merges:
            return None
        return _through(output, inputs, self._head_dim, self._values)

    def _on_qkv(self, module, inputs, output):
        """Projections in one; norms after it bring their own hooks for queries and keys."""
        if self.running is None:
            return None
        n_kv = output.shape[-1] // (self._n_groups + 2)
        q, k, v = output.split([output.shape[-1] - 2 * n_kv, n_kv, n_kv], -1)
        if "q" not in self._names:
            q, k = self._on_q(module, inputs, q), self._on_k(module, inputs, k)
        changed = self._on_v(module, inputs, v)
        return torch.cat([q, k, v if changed is None else changed], -1)

    # -- on [B, S, H, D] ---------------------------------------------------------------------------------------------

    def _queries(self, q: torch.Tensor) -> torch.Tensor:
        call = self.running
        settings = call.settings
        self._decide(call, q.shape[2] // self._n_groups)
        if not settings.ablates:
            return q
        grouped = q.unflatten(2, (-1, self._n_groups))  # [B, S, Hkv, G, D]
        if settings.merges:
            call.query = grouped[..., settings.neuron].mean(-1)
            return self._without(q, settings)
        # the first query head of a group decides; the others keep all their channels
        if call.compresses and settings.decision == "borrowed":
            self._resolve(call, grouped[..., 0, settings.neuron].transpose(1, 2), None)
        return torch.cat([self._without(grouped[..., :1, :], settings), grouped[..., 1:, :]], -2).flatten(2, 3)

    def _keys(self, k: torch.Tensor) -> torch.Tensor:
        call = self.running
        settings = call.settings
        self._decide(call, k.shape[2])
        if not settings.merges:
            return k
        if call.compresses and settings.decision == "borrowed":
            if call.query is None:
                raise RuntimeError(_ORDER.format("keys before queries"))
            self._resolve(call, k[..., settings.neuron].transpose(1, 2), call.query.transpose(1, 2))
        k = self._without(k, settings) if settings.ablates else k
        return call.merged(k, "k") if call.compresses else k

    def _values(self, v: torch.Tensor) -> torch.Tensor:
        call = self.running
        self._decide(call, v.shape[2])
        if call.p is None:
            raise RuntimeError(_ORDER.format("values before keys are normalised"))
        return call.merged(v, "v")

    def _without(self, x: torch.Tensor, settings: Settings) -> torch.Tensor:
        """The borrowed channel, faded out."""
        # what inference mode makes cannot be trained with
        key = x.dtype, x.device, settings.neuron, self.owner.fade, torch.is_inference_mode_enabled()
        # looked at once: another thread may need another one
        kept = self._keep
        if kept is None or kept[0] != key:
            keep = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
            keep[settings.neuron] = self.owner.fade
            kept = self._keep = key, keep
        return x * kept[1]


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
