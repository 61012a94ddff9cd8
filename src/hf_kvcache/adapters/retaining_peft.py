"""Retaining heads as a PEFT adapter: a child on every attention module, which caches ask for the scores of new tokens.

The adapter alone leaves the model's forward as it is; an eviction policy finds it and keeps what scores high (Locret,
Huang et al. 2024, arXiv 2410.01805). Importing this module makes the method known to PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from hf_kvcache.adapters import having_peft, retaining, tuner  # noqa: F401
from hf_kvcache.adapters.capture import Capture
from hf_kvcache.adapters.modules import RETAIN_CHILD, attentions, full_attentions
from hf_kvcache.adapters.peft_types import peft_type, register
from hf_kvcache.adapters.projections import sources
from hf_kvcache.adapters.retaining_files import RETAINING, feature_dim
from hf_kvcache.adapters.scoring import score_in_blocks
from hf_kvcache.shards import WHOLE, Shard

RETAINING_HEAD = peft_type(RETAINING.peft_type)


@dataclass
class RetainingHeadConfig(tuner.ChildConfig):
    """What `adapter_config.json` says of `RetainingHeads`."""

    d_r: int = field(default=256, metadata={"help": "rows of the first matrix"})
    activation: str | None = field(default=None, metadata={"help": "between the matrices; the model's own unless told"})
    feature_point: str | None = field(default=None, metadata={"help": "q and k of the 'projection' or its 'norm'"})
    feature_dim: int | None = field(default=None, metadata={"help": "(Hq + 2 * Hkv) * D; filled in from the model"})
    num_kv_heads: int | None = field(default=None, metadata={"help": "KV heads of the model; filled in from it"})
    layers: list[int] | None = field(
        default=None, metadata={"help": "that have a head; all full attention unless told"}
    )
    target: str = field(
        default="answer_max", metadata={"help": "'answer_max', 'answer_weight', 'causal' or 'reconstruction'"}
    )
    query_aware: bool = field(default=False, metadata={"help": "the query's end goes before the text"})
    n_query: int | None = field(default=None, metadata={"help": "tokens of the query that do"})
    default_budget: int | None = field(default=None, metadata={"help": "slots per KV head"})
    default_chunk: int | None = field(default=None, metadata={"help": "prompt tokens between evictions"})
    default_stabilizers: int | None = field(default=None, metadata={"help": "newest slots that an eviction spares"})
    default_local: int | None = field(default=None, metadata={"help": "prompt tokens at the end that always stay"})

    kind: ClassVar = RETAINING

    def fill_in(self, model: nn.Module) -> None:
        found = attentions(model)
        if found:
            some = next(iter(found.values()))
            natural = retaining.natural(some.module)
            self.default(num_kv_heads=some.n_kv_heads, feature_dim=feature_dim(some), **natural)
        self.default(layers=sorted(full_attentions(model)))


class RetainingHeadLayer(tuner.ChildLayer):
    """The retaining heads of one attention module: `scores` of the tokens of the current call.

    Hooks on the module's own projections keep references to their outputs while it runs; they are gone when it is done.
    A hook of one's own on the attention module sees them only if it is registered with `prepend=True`.

    Attributes:
        kv_retain_fc1: `[d_r, F]` by adapter name.
        kv_retain_fc2: `[Hkv, d_r]` by adapter name.
    """

    adapter_layer_names = RETAINING.parameter_names
    other_param_names = ("_settings", "_sources")

    def __init__(self):
        super().__init__()
        self._sources: dict[str, dict[str, str]] = {}
        self._capture = Capture(self._names)

    # -- what caches and trainers ask --------------------------------------------------------------------------------

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
        return score_in_blocks(parts, fc1, shard.local_shard(fc2, 0), self.settings["activation"])

    def _parts(self) -> tuple[list[torch.Tensor], Shard]:
        """What the features of all heads consist of, and which heads this process has the keys and values of."""
        self._check_active()
        return self._capture.parts_of_all_heads(self.weights()[0].shape[1])

    def _names(self) -> dict[str, str] | None:
        """Of the modules whose outputs the current adapter looks at; None while adapters are disabled."""
        return self._sources[self.current] if self.is_active else None

    def _check_active(self) -> None:
        if not self.is_active:
            raise RuntimeError(f"there are no retaining heads: {'disabled' if self.names else 'no adapter'}")

    # -- what PEFT asks ----------------------------------------------------------------------------------------------

    def initial(self, part, shape, attention):
        return torch.empty(shape, device=self._device).normal_(0, retaining.init_std(attention))

    def hang(self, adapter_name, config, attention):
        self._sources[adapter_name] = sources(attention, config.feature_point)
        self._capture.hang(attention, self._sources[adapter_name])

    def remove(self) -> None:
        self._capture.release()

    def extra_repr(self) -> str:
        return ", ".join(f"{name!r}: {settings['target']}" for name, settings in self._settings.items())


class RetainingHeadModel(tuner.ChildModel):
    """Hangs a `RetainingHeadLayer` on every attention module that the config names."""

    prefix = f"{RETAIN_CHILD}_"
    tuner_layer_cls = RetainingHeadLayer
    config_cls = RetainingHeadConfig
    no_merge = (
        "retaining heads score tokens and change nothing that the model computes, so there is nothing to merge; "
        "unload() takes them off"
    )


register(RETAINING_HEAD, RetainingHeadConfig, RetainingHeadModel)
