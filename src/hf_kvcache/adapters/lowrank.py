"""Low-rank projections as a PEFT adapter: a child on every attention module, which caches ask for their basis.

The adapter alone leaves the model's forward as it is; a low-rank cache finds it and stores latents (Palu, Chang et al.
2025). Importing this module makes the method known to PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from hf_kvcache.adapters import having_peft, tuner  # noqa: F401
from hf_kvcache.adapters.lowrank_files import LOWRANK, PARTS
from hf_kvcache.adapters.modules import CHILD, attentions, full_attentions
from hf_kvcache.adapters.peft_types import peft_type, register
from hf_kvcache.codecs.basis import Basis

KV_LOWRANK = peft_type(LOWRANK.peft_type)


@dataclass
class LowRankKVConfig(tuner.ChildConfig):
    """What `adapter_config.json` says of bases: one number for ranks is that of every full-attention layer."""

    ranks_k: int | list | None = field(default=None, metadata={"help": "latent channels of a group of keys, by layer"})
    ranks_v: int | list | None = field(default=None, metadata={"help": "the same of values; None is a layer without"})
    group_size_k: int = field(default=1, metadata={"help": "KV heads that share latents of keys"})
    group_size_v: int = field(default=1, metadata={"help": "KV heads that share latents of values"})
    rope: str = field(default="pre", metadata={"help": "project keys before ('pre') or after ('post') RoPE"})
    has_mean_k: bool = field(default=False, metadata={"help": "subtract a mean key"})
    has_mean_v: bool = field(default=False, metadata={"help": "subtract a mean value"})
    n_kv_heads: int | None = field(default=None, metadata={"help": "KV heads of the model; filled in from it"})
    head_dim: int | None = field(default=None, metadata={"help": "head size of the model; filled in from it"})
    budget: dict | None = field(default=None, metadata={"help": "how the ranks were chosen"})
    cache_class: str | None = field(default=None, metadata={"help": "the cache that the bases were made for"})
    cache_kwargs: dict = field(default_factory=dict, metadata={"help": "and its arguments (bits, window, ...)"})

    kind: ClassVar = LOWRANK

    def fill_in(self, model: nn.Module) -> None:
        found, compressed = attentions(model), full_attentions(model)
        if compressed:
            some = next(iter(compressed.values()))
            self.default(n_kv_heads=some.n_kv_heads, head_dim=some.head_dim)
        for name in ("ranks_k", "ranks_v"):
            ranks = getattr(self, name)
            if not isinstance(ranks, list):
                setattr(self, name, [ranks if i in compressed else None for i in range(max(found, default=-1) + 1)])


class LowRankKVLayer(tuner.ChildLayer):
    """The bases of one attention module, one set of parameters per adapter. It wraps nothing and computes nothing.

    Attributes:
        kv_lowrank_{k,v}_{down,up,mean}: parameters by adapter name, in the shapes of `Basis`. They are frozen: no
            forward pass uses them.
    """

    adapter_layer_names = LOWRANK.parameter_names

    def __init__(self):
        super().__init__()
        self._made: dict[str, tuple[tuple, Basis]] = {}

    # -- what caches ask ---------------------------------------------------------------------------------------------

    @property
    def rope(self) -> str | None:
        """Where the current adapter projects keys: "pre" or "post"."""
        return self.settings

    def basis(self, side: str) -> Basis | None:
        """The current adapter's basis of one side ("k" or "v"); None without one, and while adapters are disabled.

        The same object until the parameters change, so that caches share what they place on their device.
        """
        if not self.is_active:
            return None
        tensors = {part: self._parameters_of(side, part).get(self.current) for part in PARTS}
        if tensors["down"] is None:
            return None
        state = self.current, *(_state(t) for t in tensors.values())
        if side not in self._made or self._made[side][0] != state:
            self.check_loaded(self.current)
            basis = Basis(**{part: None if t is None else t.detach() for part, t in tensors.items()})
            self._made[side] = state, basis
        return self._made[side][1]

    def _parameters_of(self, side, part) -> nn.ParameterDict:
        return getattr(self, f"{CHILD}_{side}_{part}")

    def __getstate__(self):
        # what is derived from the parameters need not be copied or pickled
        return super().__getstate__() | {"_made": {}}

    # -- what PEFT asks ----------------------------------------------------------------------------------------------

    def initial(self, part, shape, attention):
        """The leading channels of every group, until others are loaded."""
        return _leading(part.split("_")[1], shape)

    def set_adapter(self, adapter_names, inference_mode: bool = False) -> None:
        # whatever PEFT asks for: parameters that no forward uses have no gradient
        super().set_adapter(adapter_names, inference_mode=True)

    def extra_repr(self) -> str:
        return ", ".join(f"{name!r}: rope={rope!r}" for name, rope in self._settings.items())


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


class LowRankKVModel(tuner.ChildModel):
    """Hangs a `LowRankKVLayer` on every attention module that the config has ranks for."""

    prefix = f"{CHILD}_"
    tuner_layer_cls = LowRankKVLayer
    config_cls = LowRankKVConfig
    no_merge = (
        "a low-rank KV adapter changes what a cache stores, not what the model computes, so there is nothing to merge; "
        "hf_kvcache.adapters.decompose.decompose(model, bases) shrinks k_proj and v_proj, and unload() takes the "
        "adapter off"
    )


register(KV_LOWRANK, LowRankKVConfig, LowRankKVModel)
