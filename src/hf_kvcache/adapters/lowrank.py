"""Low-rank projections as a PEFT adapter: a child on every attention module, which caches ask for their basis.

The adapter alone leaves the model's forward as it is; a low-rank cache finds it and stores latents (Palu, Chang et al.
2025). Importing this module makes the method known to PEFT.

Beside an adapter of another method (LoRA on `q_proj`) give both different names: PEFT tells them apart by name when it
saves.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from hf_kvcache.adapters import layout
from hf_kvcache.adapters.bases import Bases, check_fit
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.layout import SIDES
from hf_kvcache.adapters.modules import CHILD, attentions, full_attentions
from hf_kvcache.adapters.peft_types import peft_type, register
from hf_kvcache.codecs.basis import Basis

KV_LOWRANK = peft_type(layout.PEFT_TYPE)
PARTS = ("down", "up", "mean")


@dataclass
class LowRankKVConfig(PeftConfig):
    """What `adapter_config.json` says of a low-rank adapter.

    Attributes:
        ranks_k, ranks_v: latent channels per group for every layer, None for a layer without; one number means the
            same for every full-attention layer.
        group_size_k, group_size_v: KV heads that share latents.
        rope: whether keys are projected before RoPE ("pre") or after it ("post").
        has_mean_k, has_mean_v: whether a mean row is subtracted.
        n_kv_heads, head_dim: of the model; filled in from it.
        fingerprint: what tells the base model from others; None fits every model of these shapes.
        budget: how the ranks were chosen.
        cache_class, cache_kwargs: the cache that the bases were made for (bits, window, ...).
        target_modules: not used; attention modules are found by what they have.
    """

    ranks_k: int | list | None = field(default=None, metadata={"help": "latent channels of keys, by layer"})
    ranks_v: int | list | None = field(default=None, metadata={"help": "latent channels of values, by layer"})
    group_size_k: int = field(default=1, metadata={"help": "KV heads that share latents of keys"})
    group_size_v: int = field(default=1, metadata={"help": "KV heads that share latents of values"})
    rope: str = field(default="pre", metadata={"help": "project keys before ('pre') or after ('post') RoPE"})
    has_mean_k: bool = field(default=False, metadata={"help": "subtract a mean key"})
    has_mean_v: bool = field(default=False, metadata={"help": "subtract a mean value"})
    n_kv_heads: int | None = field(default=None, metadata={"help": "KV heads of the model"})
    head_dim: int | None = field(default=None, metadata={"help": "head size of the model"})
    fingerprint: dict | None = field(default=None, metadata={"help": "what tells the base model from others"})
    budget: dict | None = field(default=None, metadata={"help": "how the ranks were chosen"})
    cache_class: str | None = field(default=None, metadata={"help": "the cache that the bases were made for"})
    cache_kwargs: dict = field(default_factory=dict, metadata={"help": "and its arguments"})
    format_version: int = field(default=layout.FORMAT_VERSION, metadata={"help": "of the files"})
    hf_kvcache_version: str | None = field(default=None, metadata={"help": "release that wrote the adapter"})
    target_modules: list | None = field(default=None, metadata={"help": "not used"})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = KV_LOWRANK
        if self.format_version != layout.FORMAT_VERSION:
            raise AdapterError(
                f"the adapter has format_version {self.format_version!r}, this release reads {layout.FORMAT_VERSION}"
            )
        if self.hf_kvcache_version is None:
            from hf_kvcache import __version__

            self.hf_kvcache_version = __version__

    def fill_in(self, model: nn.Module) -> None:
        """Take from the model what was left open, and check that the rest fits it.

        Raises:
            AdapterError: names what differs, or what the config lacks.
        """
        found, compressed = attentions(model), full_attentions(model)
        if compressed:
            some = next(iter(compressed.values()))
            self.n_kv_heads = self.n_kv_heads or some.n_kv_heads
            self.head_dim = self.head_dim or some.head_dim
        for name in ("ranks_k", "ranks_v"):
            ranks = getattr(self, name)
            if not isinstance(ranks, list):
                setattr(self, name, [ranks if i in compressed else None for i in range(max(found, default=-1) + 1)])
        layout.check_config(vars(self), "LowRankKVConfig")
        check_fit(vars(self), model)
        if not any(rank is not None for name in ("ranks_k", "ranks_v") for rank in getattr(self, name)):
            raise AdapterError("LowRankKVConfig has neither ranks_k nor ranks_v")


class LowRankKVLayer(nn.Module, BaseTunerLayer):
    """The bases of one attention module, one set of parameters per adapter. It wraps nothing and computes nothing.

    Attributes:
        kv_lowrank_{k,v}_{down,up,mean}: parameters by adapter name, in the shapes of `Basis`. They are frozen: no
            forward pass uses them.
    """

    adapter_layer_names = tuple(f"{CHILD}_{side}_{part}" for side in SIDES for part in PARTS)
    other_param_names = ("ropes",)

    def __init__(self):
        super().__init__()
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.ropes: dict[str, str] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._device = torch.device("cpu")
        self._current: str | None = None
        self._made: dict[str, tuple[tuple, Basis]] = {}

    # -- what caches ask ---------------------------------------------------------------------------------------------

    @property
    def current(self) -> str | None:
        """The adapter that was activated last; that one of another method was activated since says nothing of ours."""
        return self._current if self._current in self.ropes else None

    @property
    def rope(self) -> str | None:
        """Where the current adapter projects keys: "pre" or "post"."""
        return self.ropes.get(self.current)

    def basis(self, side: str) -> Basis | None:
        """The current adapter's basis of one side ("k" or "v"); None without one, and while adapters are disabled.

        The same object until the parameters change, so that caches share what they place on their device.
        """
        if self.current is None or self.disable_adapters:
            return None
        tensors = {part: self._parameters_of(side, part).get(self.current) for part in PARTS}
        if tensors["down"] is None:
            return None
        state = self.current, *(_state(t) for t in tensors.values())
        if side not in self._made or self._made[side][0] != state:
            basis = Basis(**{part: None if t is None else t.detach() for part, t in tensors.items()})
            self._made[side] = state, basis
        return self._made[side][1]

    def _parameters_of(self, side, part) -> nn.ParameterDict:
        return getattr(self, f"{CHILD}_{side}_{part}")

    def __getstate__(self):
        # what is derived from the parameters need not be copied or pickled
        return super().__getstate__() | {"_made": {}}

    # -- what PEFT asks ----------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: LowRankKVConfig, attention: nn.Module) -> None:
        """Add an adapter's parameters: the leading channels of every group, until others are loaded."""
        device = next(attention.parameters()).device
        # offloaded weights are on no device; these are small and stay
        self._device = torch.device("cpu") if device.type == "meta" else device
        for side in SIDES:
            rank = getattr(config, f"ranks_{side}")[attention.layer_idx]
            if rank is None:
                continue
            for part, shape in layout.shapes(vars(config), side, rank).items():
                start = _leading(part, shape).to(self._device)
                self._parameters_of(side, part)[adapter_name] = nn.Parameter(start, requires_grad=False)
        self.ropes[adapter_name] = config.rope
        if not self._active_adapter:
            self.set_adapter(adapter_name)

    def set_adapter(self, adapter_names, inference_mode: bool = False) -> None:
        # whatever PEFT asks for: parameters that no forward uses have no gradient
        super().set_adapter(adapter_names, inference_mode=True)
        self._current = next((name for name in self.active_adapters if name in self.ropes), self._current)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if self.current is None:
            self._current = next(iter(self.ropes), None)

    def get_base_layer(self) -> nn.Module:
        return self

    @property
    def weight(self):
        # the inherited one asks the base layer, which is this one again
        raise AttributeError(f"{type(self).__name__} wraps no layer and has no weight")

    @property
    def bias(self):
        raise AttributeError(f"{type(self).__name__} wraps no layer and has no bias")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: PEFT calls this on every layer when another method's adapter beside ours is merged."""

    def unmerge(self) -> None:
        """Nothing, as `merge`."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
        for name in self.adapter_layer_names:
            held = getattr(self, name)
            if adapter_name in held and not held[adapter_name].is_meta:
                held[adapter_name].data = held[adapter_name].data.to(device or self._device)

    def extra_repr(self) -> str:
        return ", ".join(f"{name!r}: rope={rope!r}" for name, rope in self.ropes.items())


def _state(parameter) -> tuple | None:
    """What changes when a parameter does."""
    if parameter is None:
        return None
    version = None if parameter.is_inference() else parameter._version
    return id(parameter), parameter.data_ptr(), version, parameter.dtype, parameter.device


def _leading(part: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A part of the basis that keeps the first channels of every group."""
    if part == "mean":
        return torch.zeros(shape)
    if part == "down":
        return torch.eye(*shape[1:]).repeat(shape[0], 1, 1)
    _, s, rank, head_dim = shape
    return torch.eye(rank, s * head_dim).unflatten(1, (s, head_dim)).transpose(0, 1).repeat(shape[0], 1, 1, 1)


class LowRankKVModel(BaseTuner):
    """Hangs a `LowRankKVLayer` on every attention module that the config has ranks for."""

    prefix = f"{CHILD}_"
    tuner_layer_cls = LowRankKVLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model, peft_config, adapter_name: str, *args, **kwargs):
        # wrapped models share their configs by name: a second method under one name would overwrite the first's
        taken = getattr(model, "peft_config", {}).get(adapter_name)
        if taken is not None and not isinstance(taken, LowRankKVConfig):
            raise AdapterError(
                f"the model has an adapter {adapter_name!r} of {taken.peft_type.value} already; give this one another "
                "adapter_name"
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def _check_new_adapter_config(self, config) -> None:
        super()._check_new_adapter_config(config)
        # layers are only touched once everything is known to fit
        config.fill_in(self.model)
        ranks = zip(config.ranks_k, config.ranks_v)
        wanted = [i for i, pair in enumerate(ranks) if pair != (None, None)]
        # not a field, so that it is not saved: names differ between a model and its wrappers
        config._attention_names = frozenset(attentions(self.model)[i].name for i in wanted)

    def _prepare_adapter_config(self, peft_config, model_config):
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config, key: str) -> bool:
        return key in peft_config._attention_names

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if not hasattr(target, CHILD):
            setattr(target, CHILD, LowRankKVLayer())
        getattr(target, CHILD).update_layer(adapter_name, peft_config, target)

    def _check_merge_allowed(self):
        raise AdapterError(
            "a low-rank KV adapter changes what a cache stores, not what the model computes, so there is nothing to "
            "merge; hf_kvcache.adapters.decompose.decompose(model, bases) shrinks k_proj and v_proj, and unload() "
            "takes the adapter off"
        )

    def _unload_and_optionally_merge(self, merge: bool = True, *args, **kwargs):
        if merge:
            self._check_merge_allowed()
        for attention in attentions(self.model).values():
            if hasattr(attention.module, CHILD):
                delattr(attention.module, CHILD)
        for name in [name for name, config in self.peft_config.items() if isinstance(config, LowRankKVConfig)]:
            del self.peft_config[name]
        if not self.peft_config and hasattr(self.model, "peft_config"):
            del self.model.peft_config
            self.model._hf_peft_config_loaded = False
        return self.model

    @classmethod
    def _get_adapter_state_dict(cls, *args, **kwargs):
        # the inherited one returns the weights of all methods on the model
        found = super()._get_adapter_state_dict(*args, **kwargs)
        return {name: t for name, t in found.items() if f".{CHILD}.{cls.prefix}" in name}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # around another method's PeftModel names have the root twice; files have it once
        key, root = super()._remove_adapter_name_from_key(key, adapter_name), layout.ROOT
        while key.startswith(root + root):
            key = key.removeprefix(root)
        return key


register(KV_LOWRANK, LowRankKVConfig, LowRankKVModel)


def attach(model: nn.Module, bases: Bases | str | os.PathLike, name: str = "default") -> None:
    """Put bases on a model without going through files: what `model.load_adapter(directory, name)` would do.

    A low-rank cache then finds them. What the model computes, and which of its parameters are trained, stays as it is.

    Args:
        model: a transformers model, or one that PEFT has wrapped.
        bases: checked against it; or the folder or Hub repository to load them from.
        name: of the adapter; another than those of the adapters that are there.

    Raises:
        AdapterError: the bases cannot be loaded, do not fit, or the name is taken.
    """
    if not isinstance(bases, Bases):
        bases = Bases.load(bases)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if name in getattr(model, "peft_config", {}):
        raise AdapterError(f"the model has an adapter {name!r} already; give this one another name")
    bases.check_model(model)
    fields = {key: value for key, value in bases.config().items() if key != "peft_type"}
    trained = [(p, p.requires_grad) for p in model.parameters()]
    with warnings.catch_warnings():
        # PEFT wonders about a second method on the model, which is what this is for
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(LowRankKVConfig(**fields), model, name)
    for parameter, requires_grad in trained:
        parameter.requires_grad = requires_grad
    for i, sides in bases.layers.items():
        layer = getattr(attentions(model)[i].module, CHILD)
        layer.set_adapter(name)
        for side, basis in sides.items():
            for part, t in basis.tensors.items():
                held = layer._parameters_of(side, part)
                held[name] = nn.Parameter(t.detach().to(layer._device, copy=True), requires_grad=False)
    # transformers' own adapter methods (set_adapter, disable_adapters, save_pretrained) ask for this
    model._hf_peft_config_loaded = True
