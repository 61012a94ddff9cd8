"""Retaining heads of a whole model: which tokens will matter, by a small MLP per layer (Locret, arXiv 2410.01805)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hf_kvcache.adapters import upstream
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.files import Place
from hf_kvcache.adapters.in_memory import Adapter
from hf_kvcache.adapters.modules import RETAIN_CHILD, attentions, full_attentions
from hf_kvcache.adapters.projections import has_norms
from hf_kvcache.adapters.retaining_files import DEFAULTS, PARTS, RETAINING, SETTINGS, feature_dim
from hf_kvcache.adapters.scoring import score


@dataclass(frozen=True, eq=False)
class RetainingHeads(Adapter):
    """Two matrices for every layer that has a head: score every token as it is written, evict those that score low.

    Locret (Huang et al. 2024, arXiv 2410.01805): `scores = fc2(act(fc1(concat(q, k, v))))` without biases, one score
    per token and KV head, of queries, keys and values before RoPE.

    Attributes:
        layers: `fc1` `[d_r, F]` and `fc2` `[Hkv, d_r]` by layer, floating point; `F = (Hq + 2 * Hkv) * D`.
        activation: between the two, by its name in `transformers.activations.ACT2FN`.
        feature_point: whether queries and keys are taken as they leave their projections ("projection"), or after the
            model's own norms of them ("norm"); values always leave their projection.
        target: what the scores were trained to be: the largest attention score of the answer ("answer_max"), or
            its largest attention weight ("answer_weight"), or that of the text repeating itself ("reconstruction").
        query_aware: whether the end of the query was put before the text in training, and must be (Locret-Q).
        n_query: and how many tokens of it.
        defaults: what the heads were made for: `budget`, `chunk`, `stabilizers`, `local`, in tokens; any of them.
        base_model: name or path of the model.
        fingerprint: what tells that model from others, `fit.fingerprint` of one layer; None fits every model of these
            shapes.

    Raises:
        AdapterError: no layer, or tensors that do not belong together.
    """

    layers: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
    activation: str = "silu"
    feature_point: str = "projection"
    target: str = "answer_max"
    query_aware: bool = False
    n_query: int | None = None
    defaults: dict = field(default_factory=dict)
    base_model: str | None = None
    fingerprint: dict | None = None

    kind: ClassVar = RETAINING

    def __post_init__(self):
        if not self.layers:
            raise AdapterError("retaining heads of no layer at all")
        if unknown := self.defaults.keys() - set(DEFAULTS):
            raise AdapterError(f"defaults are of {', '.join(DEFAULTS)}, not of {', '.join(sorted(unknown))}")
        for i, (fc1, fc2) in self.layers.items():
            if fc1.dim() != 2 or fc2.dim() != 2:
                raise AdapterError(f"the heads of layer {i} are no matrices: {tuple(fc1.shape)}, {tuple(fc2.shape)}")
        config = self.config()
        self.kind.check(config, "these heads")
        for (i, part), shape in self.kind.shapes(config).items():
            t = self.tensors[i, part]
            if tuple(t.shape) != shape or not t.is_floating_point():
                raise AdapterError(f"{part} of layer {i} is {t.dtype} {tuple(t.shape)}, those before it are {shape}")

    @classmethod
    def new(
        cls, model: torch.nn.Module, d_r: int = 256, seed: int = 0, layers: Iterable[int] | None = None, **fields
    ) -> RetainingHeads:
        """Untrained heads for a model: float32, normal, of the deviation that the model's own weights begin with.

        Args:
            model: bare or wrapped by PEFT.
            d_r: rows of `fc1`.
            seed: of the values.
            layers: that get a head; all full-attention layers unless told.
            fields: other attributes; `activation` and `feature_point` are the model's own unless told.

        Raises:
            AdapterError: the model has no full-attention layers, or lacks projections.
        """
        found = full_attentions(model) if layers is None else attentions(model)
        if layers is not None and (missing := set(layers) - found.keys()):
            raise AdapterError(f"layers: the model has {len(found)}, not {sorted(missing)}")
        if not found:
            raise AdapterError(f"{type(model).__name__} has no full-attention layers that retaining heads could serve")
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for i, attention in found.items():
            if layers is None or i in set(layers):
                std = init_std(attention.module)
                shapes = (d_r, feature_dim(attention)), (attention.n_kv_heads, d_r)
                made[i] = tuple(torch.empty(shape).normal_(0, std, generator=generator) for shape in shapes)
        fields = natural(next(iter(found.values())).module) | fields
        heads = cls(layers=made, **fields).made_for(model)
        heads.check_model(model)
        return heads

    @classmethod
    def of(cls, model: torch.nn.Module, name: str | None = None) -> RetainingHeads:
        """The heads that a model carries, trained or not: copies, to be saved without PEFT.

        Args:
            model: bare or wrapped by PEFT.
            name: of the adapter; the active one unless told.

        Raises:
            AdapterError: there are none.
        """
        children = {i: getattr(a.module, RETAIN_CHILD, None) for i, a in attentions(model).items()}
        names = {child.current for child in children.values() if child is not None}
        name = next(iter(names - {None}), None) if name is None else name
        children = {i: c for i, c in children.items() if c is not None and name in c.names}
        if not children:
            raise AdapterError(f"{type(model).__name__} carries no retaining heads" + (f" {name!r}" if name else ""))
        layers = {i: tuple(t.detach().clone() for t in child.weights(name)) for i, child in children.items()}
        settings = next(iter(children.values())).names[name]
        return cls(layers=layers, **settings).made_for(model)

    # -- what is in them ---------------------------------------------------------------------------------------------

    @property
    def tensors(self) -> dict[Place, torch.Tensor]:
        """By layer and part."""
        return {(i, part): t for i, own in sorted(self.layers.items()) for part, t in zip(PARTS, own)}

    @property
    def d_r(self) -> int:
        """Rows of `fc1`."""
        return self._some[0].shape[0]

    @property
    def feature_dim(self) -> int:
        """`F`."""
        return self._some[0].shape[1]

    @property
    def n_kv_heads(self) -> int:
        """`Hkv`."""
        return self._some[1].shape[0]

    @property
    def n_parameters(self) -> int:
        return sum(t.numel() for t in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def _some(self):
        return self.layers[min(self.layers)]

    def scores(self, layer_idx: int, features: torch.Tensor) -> torch.Tensor:
        """Of tokens by their features `[B, S, F]`: float32 `[B, Hkv, S]`; see `score`."""
        return score(features, *self.layers[layer_idx], self.activation)

    @property
    def settings(self) -> dict:
        """Everything but the tensors and the model that they are for: arguments of the class."""
        return {name: getattr(self, name) for name in (*SETTINGS, "defaults")}

    # -- files -------------------------------------------------------------------------------------------------------

    def config(self) -> dict:
        """What `adapter_config.json` says: the fields of `RetainingHeadConfig`."""
        return self.kind.config(
            self.base_model,
            self.fingerprint,
            d_r=self.d_r,
            feature_dim=self.feature_dim,
            num_kv_heads=self.n_kv_heads,
            layers=sorted(self.layers),
            **{name: value for name, value in self.settings.items() if name != "defaults"},
            **{f"default_{name}": self.defaults.get(name) for name in DEFAULTS},
        )

    @classmethod
    def from_config(cls, config: Mapping, tensors: Mapping[Place, torch.Tensor]) -> RetainingHeads:
        return cls(
            layers={i: (tensors[i, "fc1"], tensors[i, "fc2"]) for i in config["layers"]},
            base_model=config["base_model_name_or_path"],
            fingerprint=config["fingerprint"],
            **cls.kind.settings(config),
        )

    @classmethod
    def from_upstream(cls, path: str | os.PathLike, model: torch.nn.Module, **fields) -> RetainingHeads:
        """Heads that Locret's authors have released, or that their code has trained.

        Read are `model.layers.{i}.self_attn.fc1.weight` and `...fc2.weight`; other tensors are ignored.

        Args:
            path: a `.safetensors` or `.bin` file, or a folder of them; `.safetensors` go before `.bin`, of which
                tensors alone are read (`torch.load(weights_only=True)`).
            model: that they were trained for.
            fields: other attributes than the authors' (`answer_max`, features of the projections, not query-aware,
                2500 stabilizers, 100 local tokens, the model's activation).

        Raises:
            AdapterError: there are no such tensors, or they do not fit the model.
        """
        layers = upstream.read(path)
        if lacking := sorted(full_attentions(model).keys() - layers.keys()):
            raise AdapterError(f"{path} has no heads of layers {lacking} of the model")
        activation = natural(next(iter(attentions(model).values())).module)["activation"]
        heads = cls(layers=layers, **{"activation": activation, "defaults": dict(upstream.DEFAULTS)} | fields)
        heads.check_model(model)
        return heads.made_for(model)


# -- shared with `retaining_peft` --------------------------------------------------------------------------------------


def natural(module: torch.nn.Module) -> dict:
    """The `activation`, if any, and the `feature_point` that an attention module suggests."""
    config = module.config
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return {"activation": activation, "feature_point": "norm" if has_norms(module) else "projection"}


def init_std(module: torch.nn.Module) -> float:
    """Deviation of untrained weights."""
    return getattr(module.config, "initializer_range", None) or 0.02
