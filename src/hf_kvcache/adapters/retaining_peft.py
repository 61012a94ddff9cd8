"""Retaining heads as a PEFT adapter: a child on every attention module, which caches ask for the scores of new tokens.

The adapter alone leaves the model's forward as it is; an eviction policy finds it and keeps what scores high (Locret,
Huang et al. 2024, arXiv 2410.01805). Importing this module makes the method known to PEFT.

Beside an adapter of another method (LoRA on `q_proj`) give both different names: PEFT tells them apart by name when it
saves.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from hf_kvcache.adapters import having_peft, retaining, retaining_files, tuner  # noqa: F401
from hf_kvcache.adapters.capture import Capture
from hf_kvcache.adapters.modules import RETAIN_CHILD, attentions, full_attentions
from hf_kvcache.adapters.peft_types import peft_type, register
from hf_kvcache.adapters.projections import sources
from hf_kvcache.adapters.retaining import RetainingHeads
from hf_kvcache.adapters.retaining_files import PARTS, settings_of
from hf_kvcache.adapters.scoring import score
from hf_kvcache.shards import WHOLE, Shard

RETAINING_HEAD = peft_type(retaining_files.PEFT_TYPE)
_BLOCK = 4096  # tokens whose features are in memory at once


@dataclass
class RetainingHeadConfig(tuner.ChildConfig):
    """What `adapter_config.json` says of retaining heads.

    Attributes:
        d_r: rows of the first matrix.
        activation, feature_point, target, query_aware, n_query: as in `RetainingHeads`; the first two are the model's
            own unless told.
        feature_dim, num_kv_heads: of the model; filled in from it.
        layers: that have a head; all full-attention layers unless told.
        default_budget, default_chunk, default_stabilizers, default_local: what the heads were made for, in tokens.
        fingerprint: what tells the base model from others; None fits every model of these shapes. Filled in for
            training.
        target_modules: not used; attention modules are found by what they have.
    """

    d_r: int = field(default=256, metadata={"help": "rows of the first matrix"})
    activation: str | None = field(default=None, metadata={"help": "between the matrices, by transformers' name"})
    feature_point: str | None = field(default=None, metadata={"help": "q and k of the 'projection' or its 'norm'"})
    feature_dim: int | None = field(default=None, metadata={"help": "(Hq + 2 * Hkv) * D of the model"})
    num_kv_heads: int | None = field(default=None, metadata={"help": "KV heads of the model"})
    layers: list[int] | None = field(default=None, metadata={"help": "that have a head"})
    target: str = field(default="answer_max", metadata={"help": "'answer_max' or 'reconstruction'"})
    query_aware: bool = field(default=False, metadata={"help": "the query's end goes before the text"})
    n_query: int | None = field(default=None, metadata={"help": "tokens of the query that do"})
    default_budget: int | None = field(default=None, metadata={"help": "slots per KV head"})
    default_chunk: int | None = field(default=None, metadata={"help": "prompt tokens between evictions"})
    default_stabilizers: int | None = field(default=None, metadata={"help": "newest slots that an eviction spares"})
    default_local: int | None = field(default=None, metadata={"help": "prompt tokens at the end that always stay"})
    fingerprint: dict | None = field(default=None, metadata={"help": "what tells the base model from others"})
    format_version: int = field(default=retaining_files.FORMAT_VERSION, metadata={"help": "of the files"})
    hf_kvcache_version: str | None = field(default=None, metadata={"help": "release that wrote the adapter"})
    target_modules: list | None = field(default=None, metadata={"help": "not used"})

    kind: ClassVar = RETAINING_HEAD
    format: ClassVar = retaining_files.FORMAT

    def fill_in(self, model: nn.Module) -> None:
        found = attentions(model)
        if found:
            some = next(iter(found.values()))
            self.num_kv_heads = some.n_kv_heads if self.num_kv_heads is None else self.num_kv_heads
            self.feature_dim = retaining.feature_dim(some) if self.feature_dim is None else self.feature_dim
            if self.activation is None or self.feature_point is None:
                natural = retaining.natural(some.module)
                self.activation = self.activation or natural["activation"]
                self.feature_point = self.feature_point or natural["feature_point"]
        if self.layers is None:
            self.layers = sorted(full_attentions(model))
        retaining_files.check_config(vars(self), "RetainingHeadConfig")
        retaining.check_fit(vars(self), model)

    def layer_indices(self) -> list[int]:
        return self.layers


class RetainingHeadLayer(tuner.ChildLayer):
    """The retaining heads of one attention module: `scores` of the tokens of the current call.

    Hooks on the module's own projections keep references to their outputs while it runs; they are gone when it is done.
    A hook of one's own on the attention module sees them only if it is registered with `prepend=True`.

    Attributes:
        kv_retain_fc1: `[d_r, F]` by adapter name.
        kv_retain_fc2: `[Hkv, d_r]` by adapter name.
    """

    adapter_layer_names = tuple(f"{RETAIN_CHILD}_{part}" for part in PARTS)
    other_param_names = ("_settings", "_sources")

    def __init__(self):
        super().__init__()
        self._settings: dict[str, dict] = {}
        self._sources: dict[str, dict[str, str]] = {}
        self._capture = Capture()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    # -- what caches and trainers ask --------------------------------------------------------------------------------

    @property
    def names(self) -> dict[str, dict]:
        """Settings (`RetainingHeads.settings`) by adapter name."""
        return self._settings

    @property
    def settings(self) -> dict | None:
        """Of the current adapter: `activation`, `feature_point`, `target`, `query_aware`, `n_query`, `defaults`."""
        return self._settings.get(self.current)

    def weights(self, name: str | None = None) -> tuple[nn.Parameter, nn.Parameter]:
        """`fc1` `[d_r, F]` and `fc2` `[Hkv, d_r]` of an adapter, the current one unless told.

        Raises:
            AdapterError: the adapter's file did not hold them all, or NaN or infinity.
        """
        name = self.current if name is None else name
        self.check_loaded(name)
        return tuple(getattr(self, own)[name] for own in self.adapter_layer_names)

    def features(self) -> torch.Tensor:
        """Queries, keys and values of the tokens of the current call, `[B, S, F]` in the dtype of the model.

        Of all heads, under tensor parallelism, too; then without the graph of other processes.

        In the order q, k, v, heads after heads, before RoPE; with their graph if gradients are enabled.

        Raises:
            RuntimeError: the attention module is not running, or its projections have not run yet.
        """
        return torch.cat(self._parts()[0], -1)

    def scores(self, features: torch.Tensor | None = None) -> torch.Tensor:
        """How much later tokens will look at every token, float32 `[B, Hkv, S]`, by the KV heads of this process.

        Args:
            features: `[B, S, F]`; those of the tokens of the current call unless told.

        Raises:
            RuntimeError: there are no heads, they are disabled, or nothing has been captured.
        """
        self._check_active()
        parts, shard = self._parts() if features is None else ([features], WHOLE)
        fc1, fc2 = self.weights()
        # cast once, not for every block
        fc1, fc2 = fc1.to(parts[0]), shard.local_shard(fc2, 0)
        blocks = zip(*(part.split(_BLOCK, 1) for part in parts))
        found = [score(torch.cat(block, -1), fc1, fc2, self.settings["activation"]) for block in blocks]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def _parts(self) -> tuple[list[torch.Tensor], Shard]:
        """What the features of all heads consist of, and which heads this process has the keys and values of."""
        self._check_active()
        parts, shard = self._capture.parts_of_all_heads(self.weights()[0].shape[1])
        if not parts:
            raise RuntimeError(
                "no features have been captured: scores and features are there only while the attention module runs, "
                "after its projections (a hook on the module needs prepend=True)"
            )
        return parts, shard

    def _check_active(self) -> None:
        if not self.is_active:
            raise RuntimeError(f"there are no retaining heads: {'disabled' if self.names else 'no adapter'}")

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _before(self, attention: nn.Module, args) -> None:
        is_active = self.is_active
        self._capture.arm(attention if is_active else None)
        if is_active:
            # PEFT may have wrapped or unwrapped a projection since
            self._capture.watch(attention, self._sources[self.current])

    def _after(self, attention: nn.Module, args, output) -> None:
        self._capture.drop()

    def remove(self) -> None:
        self._capture.release()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # -- what PEFT asks ----------------------------------------------------------------------------------------------

    def add(self, adapter_name: str, config: RetainingHeadConfig, attention: nn.Module) -> None:
        shapes, std = retaining_files.shapes(vars(config)), retaining.init_std(attention)
        for part in PARTS:
            start = torch.empty(shapes[attention.layer_idx, part], device=self._device)
            # values that are about to be loaded need not be drawn
            start = start if config.inference_mode else start.normal_(0, std)
            getattr(self, f"{RETAIN_CHILD}_{part}")[adapter_name] = self.start(start, config)
        self._settings[adapter_name] = settings_of(vars(config))
        if not self._handles:
            self._handles = [
                attention.register_forward_pre_hook(self._before),
                attention.register_forward_hook(self._after, always_call=True),
            ]
        self._sources[adapter_name] = sources(attention, config.feature_point)
        self._capture.watch(attention, self._sources[adapter_name])

    def extra_repr(self) -> str:
        return ", ".join(f"{name!r}: {settings['target']}" for name, settings in self._settings.items())


class RetainingHeadModel(tuner.ChildModel):
    """Hangs a `RetainingHeadLayer` on every attention module that the config names."""

    prefix = f"{RETAIN_CHILD}_"
    child = RETAIN_CHILD
    tuner_layer_cls = RetainingHeadLayer
    config_cls = RetainingHeadConfig
    no_merge = (
        "retaining heads score tokens and change nothing that the model computes, so there is nothing to merge; "
        "unload() takes them off"
    )


register(RETAINING_HEAD, RetainingHeadConfig, RetainingHeadModel)


def attach(
    model: nn.Module, heads: RetainingHeads | str | os.PathLike, name: str = "default", trainable: bool = False, **hub
) -> None:
    """Put retaining heads on a model without going through files: what `model.load_adapter(directory, name)` would do.

    Eviction policies then find them. What the model computes, and which of its other parameters are trained, stays as
    it is.

    Args:
        model: a transformers model, or one that PEFT has wrapped.
        heads: checked against it, copied; or the folder or Hub repository to load them from.
        name: of the adapter; another than those of the adapters that are there.
        trainable: whether their parameters are.
        hub: `revision`, `token`, `subfolder` and the like for the Hub.

    Raises:
        AdapterError: the heads cannot be loaded, do not fit, or the name is taken.
    """
    if not isinstance(heads, RetainingHeads):
        heads = RetainingHeads.load(heads, **hub)
    model = tuner.bare(model)
    tuner.check_name(model, name)
    heads.check_model(model)
    fields = {key: value for key, value in heads.config().items() if key != "peft_type"}
    tuner.put(model, RetainingHeadConfig(**fields), heads.tensors, name, trainable)
