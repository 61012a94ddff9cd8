"""The bases of a whole model: what calibration or training produces and a low-rank cache needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.files import Place
from hf_kvcache.adapters.in_memory import Adapter
from hf_kvcache.adapters.lowrank_files import LOWRANK, SIDES, assemble, shapes_of
from hf_kvcache.codecs.basis import Basis


@dataclass(frozen=True, eq=False)
class Bases(Adapter):
    """A `Basis` for keys ("k") and values ("v") of every layer that has one.

    Group sizes, and whether rows are centred, are the same in all layers; ranks need not be.

    Attributes:
        layers: by layer index and side; a side may be missing.
        rope: whether keys are projected before RoPE ("pre") or after it ("post").
        budget: how the ranks were chosen, for people and model cards.
        base_model: name or path of the model.
        fingerprint: what tells that model from others: `fingerprint.fingerprint` of the attention module of one layer,
            and which. None fits every model of these shapes.
        cache: `{"class": name, "kwargs": {...}}` of the cache that the bases were made for.

    Raises:
        AdapterError: no layer, or tensors that do not belong together.
    """

    layers: Mapping[int, Mapping[str, Basis]]
    rope: str = "pre"
    budget: dict | None = None
    base_model: str | None = None
    fingerprint: dict | None = None
    cache: dict = field(default_factory=dict)

    kind: ClassVar = LOWRANK

    def __post_init__(self):
        every = [(i, side, basis) for i, sides in self.layers.items() for side, basis in sides.items()]
        if not every:
            raise AdapterError("bases of no layer at all")
        for i, side, _ in every:
            if side not in SIDES or i < 0:
                raise AdapterError(f"layer {i}, side {side!r}: sides are 'k' and 'v', layers are counted from 0")
        config = self.config()
        for i, side, basis in every:
            if {part: tuple(t.shape) for part, t in basis.tensors.items()} != shapes_of(config, side, basis.rank):
                raise AdapterError(f"the basis of layer {i}, side {side!r}, does not match those of the other layers")
        self.kind.check(config, "these bases")

    # -- what is in them ---------------------------------------------------------------------------------------------

    def of(self, layer_idx: int, side: str) -> Basis | None:
        """The basis of one side of one layer, or None."""
        return self.layers.get(layer_idx, {}).get(side)

    @property
    def n_kv_heads(self) -> int:
        """`Hkv`."""
        basis = self._any()
        return basis.n_groups * basis.group_size

    @property
    def head_dim(self) -> int:
        """`D`."""
        return self._any().up.shape[-1]

    @property
    def group_sizes(self) -> dict[str, int]:
        """KV heads that share latents, by side."""
        return {side: 1 if self._any(side) is None else self._any(side).group_size for side in SIDES}

    @property
    def ranks(self) -> dict[int, dict[str, int]]:
        """Latent channels per group, by layer and side."""
        return {i: {side: basis.rank for side, basis in sides.items()} for i, sides in self.layers.items()}

    def nbytes_per_token(self, itemsize: float = 2) -> float:
        """Bytes of the latents of one token in all layers, at `itemsize` bytes a channel."""
        return itemsize * sum(b.n_groups * b.rank for sides in self.layers.values() for b in sides.values())

    def truncated(self, ranks: int | Mapping) -> Bases:
        """The leading directions only.

        Args:
            ranks: one rank for all, `{"k": rank, "v": rank}`, or `{layer_idx: {"k": rank, "v": rank}}`; what is not
                mentioned stays.

        Raises:
            ValueError: a basis has fewer.
        """

        def rank(i, side, basis):
            if not isinstance(ranks, Mapping):
                return ranks
            return ranks.get(i, ranks).get(side, basis.rank)

        layers = {
            i: {side: basis.truncated(rank(i, side, basis)) for side, basis in sides.items()}
            for i, sides in self.layers.items()
        }
        return replace(self, layers=layers)

    def _any(self, side: str | None = None) -> Basis | None:
        sides = SIDES if side is None else (side,)
        return next((own[s] for own in self.layers.values() for s in sides if s in own), None)

    # -- files -------------------------------------------------------------------------------------------------------

    @property
    def tensors(self) -> dict[Place, torch.Tensor]:
        return {
            (i, f"{side}_{part}"): t
            for i, sides in self.layers.items()
            for side, basis in sides.items()
            for part, t in basis.tensors.items()
        }

    def config(self) -> dict:
        """What `adapter_config.json` says: the fields of `LowRankKVConfig`."""
        ranks = {side: [self.ranks.get(i, {}).get(side) for i in range(self.n_layers)] for side in SIDES}
        has_mean = {side: self._any(side) is not None and self._any(side).mean is not None for side in SIDES}
        return self.kind.config(
            self.base_model,
            self.fingerprint,
            rope=self.rope,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            budget=self.budget,
            cache_class=self.cache.get("class"),
            cache_kwargs=dict(self.cache.get("kwargs", {})),
            **{f"ranks_{side}": ranks[side] for side in SIDES},
            **{f"group_size_{side}": self.group_sizes[side] for side in SIDES},
            **{f"has_mean_{side}": has_mean[side] for side in SIDES},
        )

    @classmethod
    def from_config(cls, config: Mapping, tensors: Mapping[Place, torch.Tensor]) -> Bases:
        cache = (
            {"class": config["cache_class"], "kwargs": config["cache_kwargs"] or {}} if config["cache_class"] else {}
        )
        return cls(
            layers=assemble(tensors),
            rope=config["rope"],
            budget=config["budget"],
            base_model=config["base_model_name_or_path"],
            fingerprint=config["fingerprint"],
            cache=cache,
        )
