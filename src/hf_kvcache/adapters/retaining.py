"""Retaining heads of a whole model: which tokens will matter, by a small MLP per layer (Locret, arXiv 2410.01805)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from hf_kvcache.adapters import files, fit, upstream
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.modules import RETAIN_CHILD, Attention, attentions, full_attentions
from hf_kvcache.adapters.projections import has_norms, sources
from hf_kvcache.adapters.retaining_files import (
    DEFAULTS,
    FORMAT,
    FORMAT_VERSION,
    PARTS,
    PEFT_TYPE,
    check_config,
    settings_of,
    shapes,
)
from hf_kvcache.adapters.scoring import score


@dataclass(frozen=True, eq=False)
class RetainingHeads:
    """Two matrices for every layer that has a head: score every token as it is written, evict those that score low.

    Locret (Huang et al. 2024, arXiv 2410.01805): `scores = fc2(act(fc1(concat(q, k, v))))` without biases, one score
    per token and KV head, of queries, keys and values before RoPE.

    Attributes:
        layers: `fc1` `[d_r, F]` and `fc2` `[Hkv, d_r]` by layer, floating point; `F = (Hq + 2 * Hkv) * D`.
        activation: between the two, by its name in `transformers.activations.ACT2FN`.
        feature_point: whether queries and keys are taken as they leave their projections ("projection"), or after the
            model's own norms of them ("norm"); values always leave their projection.
        target: what the scores were trained to be: the largest attention score of the answer ("answer_max"), or of
            the text repeating itself ("reconstruction").
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

    def __post_init__(self):
        if not self.layers:
            raise AdapterError("retaining heads of no layer at all")
        if unknown := self.defaults.keys() - set(DEFAULTS):
            raise AdapterError(f"defaults are of {', '.join(DEFAULTS)}, not of {', '.join(sorted(unknown))}")
        for i, (fc1, fc2) in self.layers.items():
            if fc1.dim() != 2 or fc2.dim() != 2:
                raise AdapterError(f"the heads of layer {i} are no matrices: {tuple(fc1.shape)}, {tuple(fc2.shape)}")
        config = self.config()
        check_config(config, "these heads")
        for (i, part), shape in shapes(config).items():
            t = self.tensors[i, part]
            if tuple(t.shape) != shape or not t.is_floating_point():
                raise AdapterError(f"{part} of layer {i} is {t.dtype} {tuple(t.shape)}, those before it are {shape}")

    def __deepcopy__(self, memo) -> RetainingHeads:
        # constants: copies of a cache share them
        return self

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
    def tensors(self) -> dict[files.Place, torch.Tensor]:
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
    def n_layers(self) -> int:
        """Layers of the model, as far as is known: at least one more than the largest index."""
        return known_layers(self.fingerprint, self.layers)

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

    def to(self, *args, **kwargs) -> RetainingHeads:
        """The same heads in another dtype or on another device; arguments as `torch.Tensor.to`."""
        layers = {i: tuple(t.to(*args, **kwargs) for t in own) for i, own in self.layers.items()}
        return replace(self, layers=layers)

    @property
    def settings(self) -> dict:
        """Everything but the tensors and the model that they are for: arguments of the class."""
        names = ("activation", "feature_point", "target", "query_aware", "n_query", "defaults")
        return {name: getattr(self, name) for name in names}

    # -- the model ---------------------------------------------------------------------------------------------------

    def made_for(self, model: torch.nn.Module, name: str | None = None) -> RetainingHeads:
        """The same heads, tied to a model by its name and its fingerprint."""
        found = attentions(model)
        if min(self.layers) not in found:
            raise AdapterError(f"layers: the model has {len(found)}, the adapter is for {sorted(self.layers)}")
        first = found[min(self.layers)].module
        name = fit.model_name(model, first) if name is None else name
        return replace(self, base_model=name, fingerprint=fit.fingerprint(first))

    def check_model(self, model: torch.nn.Module, weights: bool = True) -> None:
        """Raise unless these heads fit a model, or one attention module of it.

        Args:
            model: the model, bare or wrapped by PEFT, or one attention module.
            weights: also compare a sample of the base weights, where they are there to be compared.

        Raises:
            AdapterError: names all that differs, or the projections that are missing.
        """
        check_fit(self.config(), model, weights)

    # -- files -------------------------------------------------------------------------------------------------------

    def config(self) -> dict:
        """What `adapter_config.json` says: the fields of `RetainingHeadConfig`."""
        from hf_kvcache import __version__

        return {
            "peft_type": PEFT_TYPE,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "base_model_name_or_path": self.base_model,
            "format_version": FORMAT_VERSION,
            "hf_kvcache_version": __version__,
            "d_r": self.d_r,
            "feature_dim": self.feature_dim,
            "num_kv_heads": self.n_kv_heads,
            "layers": sorted(self.layers),
            "fingerprint": self.fingerprint,
            **{name: value for name, value in self.settings.items() if name != "defaults"},
            **{f"default_{name}": self.defaults.get(name) for name in DEFAULTS},
        }

    def save(self, directory: str | os.PathLike, model: torch.nn.Module | None = None) -> Path:
        """Write a PEFT adapter: `PeftModel.from_pretrained`, `model.load_adapter` and `RetainingHeads.load` read it.

        Args:
            directory: created if need be; an earlier adapter there is replaced, atomically.
            model: the model that the heads are for. Its name, its fingerprint and the paths of its attention modules
                are recorded; without it, heads that do not know their model fit every one of the same shapes.

        Raises:
            AdapterError: they do not fit `model`, or hold NaN or infinity.
        """
        heads = self if model is None or self.fingerprint is not None else self.made_for(model)
        if model is not None:
            heads.check_model(model)
        return FORMAT.write(directory, heads.config(), heads.tensors, fit.module_paths(model, self.layers))

    @classmethod
    def load(cls, source: str | os.PathLike, **hub) -> RetainingHeads:
        """Read an adapter from a folder or from the Hub; PEFT is not needed.

        Args:
            source: folder, or name of a repository on the Hub.
            hub: `revision`, `token`, `subfolder` and the like for the Hub.

        Raises:
            AdapterError: files are missing, pickled, damaged, of another format, or say something impossible.
        """
        config, tensors = FORMAT.read(source, **hub)
        return cls(
            layers={i: (tensors[i, "fc1"], tensors[i, "fc2"]) for i in config["layers"]},
            base_model=config["base_model_name_or_path"],
            fingerprint=config["fingerprint"],
            **settings_of(config),
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


def feature_dim(attention: Attention) -> int:
    """`F = (Hq + 2 * Hkv) * D`."""
    return (attention.n_heads + 2 * attention.n_kv_heads) * attention.head_dim


def natural(module: torch.nn.Module) -> dict:
    """The `activation`, if any, and the `feature_point` that an attention module suggests."""
    config = module.config
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return {"activation": activation, "feature_point": "norm" if has_norms(module) else "projection"}


def init_std(module: torch.nn.Module) -> float:
    """Deviation of untrained weights."""
    return getattr(module.config, "initializer_range", None) or 0.02


def known_layers(fingerprint: Mapping | None, layers: Iterable[int]) -> int:
    """Layers of the model, as far as is known."""
    known = (fingerprint or {}).get("num_hidden_layers")
    return max(known if isinstance(known, int) else 0, max(layers) + 1)


def check_fit(config: Mapping, model: torch.nn.Module, weights: bool = True) -> None:
    """`RetainingHeads.check_model` for heads of which only the config is known."""

    def sizes(attention):
        yield "KV heads", config["num_kv_heads"], attention.n_kv_heads
        yield "features", config["feature_dim"], feature_dim(attention)

    layers = config["layers"]
    n_layers = known_layers(config.get("fingerprint"), layers)
    for i, attention in attentions(model).items():
        if i in layers:
            sources(attention.module, config["feature_point"])
    fit.check_fit(config, model, layers=layers, n_layers=n_layers, sizes=sizes, weights=weights)
