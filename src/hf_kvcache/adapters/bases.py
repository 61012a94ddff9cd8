"""The bases of a whole model: what calibration or training produces and a low-rank cache needs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from hf_kvcache.adapters import fit, layout
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.layout import SIDES
from hf_kvcache.adapters.modules import attentions, full_attentions, is_attention
from hf_kvcache.codecs.basis import Basis


@dataclass(frozen=True, eq=False)
class Bases:
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

    def __post_init__(self):
        every = [(i, side, basis) for i, sides in self.layers.items() for side, basis in sides.items()]
        if not every:
            raise AdapterError("bases of no layer at all")
        for i, side, basis in every:
            if side not in SIDES or i < 0:
                raise AdapterError(f"layer {i}, side {side!r}: sides are 'k' and 'v', layers are counted from 0")
            own = layout.shapes(self._shape_of(side), side, basis.rank)
            if {part: tuple(t.shape) for part, t in basis.tensors.items()} != own:
                raise AdapterError(f"the basis of layer {i}, side {side!r}, does not match those of the other layers")
        layout.check_config(self.config(), "these bases")

    def __deepcopy__(self, memo) -> Bases:
        # constants: copies of a cache share them
        return self

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
    def n_layers(self) -> int:
        """Layers of the model, as far as is known: at least one more than the largest index."""
        known = (self.fingerprint or {}).get("num_hidden_layers")
        return max(known if isinstance(known, int) else 0, max(self.layers) + 1)

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

    def to(self, dtype: torch.dtype) -> Bases:
        """The same bases in another dtype."""
        layers = {
            i: {side: Basis(**{part: t.to(dtype) for part, t in b.tensors.items()}) for side, b in sides.items()}
            for i, sides in self.layers.items()
        }
        return replace(self, layers=layers)

    def _any(self, side: str | None = None) -> Basis | None:
        sides = SIDES if side is None else (side,)
        return next((own[s] for own in self.layers.values() for s in sides if s in own), None)

    def _shape_of(self, side):
        basis = self._any(side)
        shape = {"n_kv_heads": self.n_kv_heads, "head_dim": self.head_dim}
        return shape | {f"group_size_{side}": basis.group_size, f"has_mean_{side}": basis.mean is not None}

    # -- the model ---------------------------------------------------------------------------------------------------

    def made_for(self, model: torch.nn.Module, name: str | None = None) -> Bases:
        """The same bases, tied to a model by its name and its fingerprint."""
        first = attentions(model)[min(self.layers)].module
        name = fit.model_name(model, first) if name is None else name
        return replace(self, base_model=name, fingerprint=fit.fingerprint(first))

    def check_model(self, model: torch.nn.Module, weights: bool = True) -> None:
        """Raise unless these bases fit a model, or one attention module of it.

        Args:
            model: the model, bare or wrapped by PEFT, or one attention module.
            weights: also compare a sample of the base weights, where they are there to be compared; False lets a
                decomposed, or otherwise changed, model pass.

        Raises:
            AdapterError: names all that differs.
        """
        check_fit(self.config(), model, weights)

    # -- files -------------------------------------------------------------------------------------------------------

    def config(self) -> dict:
        """What `adapter_config.json` says: the fields of `LowRankKVConfig`."""
        from hf_kvcache import __version__

        ranks = {side: [self.ranks.get(i, {}).get(side) for i in range(self.n_layers)] for side in SIDES}
        has_mean = {side: self._any(side) is not None and self._any(side).mean is not None for side in SIDES}
        return {
            "peft_type": layout.PEFT_TYPE,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "base_model_name_or_path": self.base_model,
            "format_version": layout.FORMAT_VERSION,
            "hf_kvcache_version": __version__,
            "rope": self.rope,
            "n_kv_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "fingerprint": self.fingerprint,
            "budget": self.budget,
            "cache_class": self.cache.get("class"),
            "cache_kwargs": dict(self.cache.get("kwargs", {})),
            **{f"ranks_{side}": ranks[side] for side in SIDES},
            **{f"group_size_{side}": self.group_sizes[side] for side in SIDES},
            **{f"has_mean_{side}": has_mean[side] for side in SIDES},
        }

    def save(self, directory: str | os.PathLike, model: torch.nn.Module | None = None) -> Path:
        """Write a PEFT adapter: `PeftModel.from_pretrained`, `model.load_adapter` and `Bases.load` read it.

        Args:
            directory: created if need be; an earlier adapter there is replaced, atomically.
            model: the model that the bases are for. Its name, its fingerprint and the paths of its attention modules
                are recorded; without it, bases that do not know their model fit every one of the same shapes.

        Raises:
            AdapterError: they do not fit `model`, or hold NaN or infinity.
        """
        bases = self if model is None or self.fingerprint is not None else self.made_for(model)
        if model is not None:
            bases.check_model(model)
        return layout.write(directory, bases.config(), bases.layers, fit.module_paths(model, self.layers))

    @classmethod
    def load(cls, source: str | os.PathLike, **hub) -> Bases:
        """Read an adapter from a folder or from the Hub; PEFT is not needed.

        Args:
            source: folder, or name of a repository on the Hub.
            hub: `revision`, `token`, `subfolder` and the like for the Hub.

        Raises:
            AdapterError: files are missing, pickled, damaged, of another format, or say something impossible.
        """
        config, layers = layout.read(source, **hub)
        return cls.from_config(config, layers)

    @classmethod
    def from_config(cls, config: Mapping, layers: Mapping[int, Mapping[str, Basis]]) -> Bases:
        """Bases as `config` describes them, around tensors that are there already."""
        cache = (
            {"class": config["cache_class"], "kwargs": config["cache_kwargs"] or {}} if config["cache_class"] else {}
        )
        return cls(
            layers=layers,
            rope=config["rope"],
            budget=config["budget"],
            base_model=config["base_model_name_or_path"],
            fingerprint=config["fingerprint"],
            cache=cache,
        )


def check_fit(config: Mapping, model: torch.nn.Module, weights: bool = True) -> None:
    """`Bases.check_model` for bases of which only the config is known."""
    every = {i for side in SIDES for i, rank in enumerate(config[f"ranks_{side}"]) if rank is not None}

    def sizes(attention):
        yield "KV heads", config["n_kv_heads"], attention.n_kv_heads
        yield "head size", config["head_dim"], attention.head_dim

    def windowed(found):
        if is_attention(model):
            return []
        layers = sorted(every - full_attentions(model).keys())
        return [f"layers {layers} are not plain full attention, whose rows alone are compressed"] if layers else []

    n_layers = len(config["ranks_k"])
    fit.check_fit(config, model, layers=every, n_layers=n_layers, sizes=sizes, further=windowed, weights=weights)
