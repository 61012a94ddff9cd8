"""The cache: a list of layers that compress themselves."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from hf_kvcache import compat, former_names
from hf_kvcache.accounting import Accounting
from hf_kvcache.attention.known import register_pass_throughs
from hf_kvcache.cache_contract import CacheContract
from hf_kvcache.cache_options import check_options, codec_pair
from hf_kvcache.expanding import Lending
from hf_kvcache.identity import Identity
from hf_kvcache.layer import KVLayer
from hf_kvcache.layer_settings import PerLayer
from hf_kvcache.offloading import Offloading
from hf_kvcache.row_shapes import in_one_dtype
from hf_kvcache.saving import Saving
from hf_kvcache.view import KVView, ValueView
from hf_kvcache.warn import warn_once

if TYPE_CHECKING:
    from hf_kvcache.codecs.base import Codec
    from hf_kvcache.policies.base import Policy


class KVCache(Identity, PerLayer, Lending, Offloading, Saving, Accounting, CacheContract):
    """A KV cache made of a policy (which tokens stay) over a codec (how a row is encoded).

    Pass it to `generate` or to a forward pass: `model.generate(**x, cache=KVCache(codec=Quantize(4)))`
    (before transformers 5.24: `past_key_values=`).
    Without arguments it is lossless. Sliding-window and linear-attention layers keep transformers' own classes.
    Gradients flow within a forward pass; what earlier ones have cached is a constant for later ones.

    Args:
        policy: which tokens stay; None keeps all.
        codec: how rows older than the window are encoded, on keys and on values; a pair `(keys, values)` sets
            them apart; None keeps them dense.
        window: newest rows that stay dense under a codec.
        n_sink: oldest rows that stay dense under a codec.
        edge_layers: this many first and last layers, the most sensitive ones, get `edge_codec` instead.
        edge_codec: codec of those layers; None keeps them dense.
        per_layer: what single layers have instead, by their index in the model: `{0: {"codec": None, "window": 128}}`.
            Options are `codec`, `window`, `n_sink`, `min_length`, and of the policy `ratio` or `budget`; `"policy":
            None` keeps all tokens of that layer. Goes before `edge_codec`.
        min_length: tokens below which nothing is packed: a short cache is small, and dense rows are read faster.
        exact_prefill: attend to new tokens as they are and compress them afterwards. False attends to what the codec
            makes of them from the start, as published evaluations of low-rank caches do.
        rerotate_keys: give the rows that stay neighbouring positions, as if the evicted ones had never been there:
            their keys are rotated at every eviction. By default rows keep the positions of the text. In float16 and
            bfloat16 the cache then keeps keys twice, as they were appended and as they stand, because a key that is
            rotated and rounded again and again would lose its direction.
        max_length: tokens to make room for at the first call, instead of growing.
        config: the model's config. Only models with linear-attention layers need it (hybrids such as Qwen3-Next);
            others are recognised when the cache is first used.
        offloading: keep layers in CPU memory and bring them to the GPU one ahead of their turn (CUDA only).

    Raises:
        ValueError: a policy that drops single tokens over a codec that packs them in blocks; a budget, `min_length` or
            `edge_layers` with which nothing would be done; options of a layer that do not go together.
    """

    compact = former_names.Former("rerotate_keys")

    @former_names.argument("compact", "rerotate_keys")
    def __init__(
        self,
        policy: Policy | None = None,
        codec: Codec | tuple[Codec, Codec] | None = None,
        *,
        window: int = 64,
        n_sink: int = 0,
        edge_layers: int = 0,
        edge_codec: Codec | tuple[Codec, Codec] | None = None,
        per_layer: dict[int, dict] | None = None,
        min_length: int = 0,
        exact_prefill: bool = True,
        rerotate_keys: bool = False,
        max_length: int | None = None,
        config=None,
        offloading: bool = False,
    ):
        register_pass_throughs()
        self.policy, self.window, self.n_sink = policy, window, n_sink
        self.min_length, self.exact_prefill, self.max_length = min_length, exact_prefill, max_length
        self.rerotate_keys = rerotate_keys
        # whether more of the prompt follows this call; None means that nobody has said (see `prefill`)
        self.prompt_incomplete: bool | None = None
        self.codec, self.edge_layers, self.edge_codec = codec_pair(codec), edge_layers, codec_pair(edge_codec)
        self.per_layer: dict[int, dict] = {}
        if per_layer:
            from hf_kvcache.per_layer import read_options

            self.per_layer = read_options(per_layer)
        check_options(self, offloading)
        self._model: weakref.ref | None = None
        self._expected: dict | None = None
        self._hf_layers: list | None = None
        self._records_past, self.handed = False, None
        # layers hold them: when the last one forgets its text, they go
        self._ropes = weakref.WeakValueDictionary()
        self._n_states: dict[int, int] = {}
        if config is not None:
            self._learn_layers(config)
        super().__init__(layers=[], offloading=offloading, offload_only_non_sliding=True)
        self._add_layers(len(self._hf_layers or ()))

    # -- the walk: append here; attention asks the layer to prepare and to compress ------------------------------------

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """Append `[B, Hkv, S, D]` to a layer; returns a `KVView` and its values, or tensors for layers not ours."""
        if self.handed is not None:
            self._end_handing_out()
        if len(self.layers) <= layer_idx:
            self._add_layers(layer_idx + 1)
        layer = self.layers[layer_idx]
        if self.offloading and key_states.is_cuda:
            self._prefetch_ahead(layer_idx, key_states.device)
        if not isinstance(layer, KVLayer):
            return layer.update(key_states, value_states, *args, **kwargs)
        if key_states.dtype != value_states.dtype:
            key_states, value_states = in_one_dtype(key_states, value_states)
        view = layer.append(key_states, value_states)
        view.cache = self
        return view, ValueView(view)

    def meet(self, call) -> bool:
        """Learn the model from the attention module that makes an `AttentionCall`.

        Returns:
            False if the layer belongs to transformers' own class (sliding window, ...): it has taken the rows over.

        Raises:
            ValueError: the cache holds tokens of another model, or lacks the model's config.
        """
        view, module = call.view, call.module
        layer, layer_idx = view.layer, view.layer.layer_idx
        if self._hf_layers is None:
            self._learn_layers(module.config)
        if layer_idx in self._n_states and not layer.has_states:
            # the first layer of such a model: attention comes before linear attention
            raise ValueError(self._lacks_config)
        hf_layer = self._hf_layer(layer_idx)
        if hf_layer is not None:
            hf_layer.update(view.new_k, view.new_v)
            self.layers[layer_idx] = hf_layer
            return False
        layer.check_ready()
        if layer_idx == self.first_layer:
            self._recognise(module, view.is_prefill)
        if layer.needs_model:
            self.attach(module, layer)
            layer.store.on_bound(self, layer_idx)
        layer.met = weakref.ref(module)
        return True

    def holds(self, view: KVView) -> bool:
        """Whether the rows of `view` are in a layer that is ours, asked once the layer's own module has read it."""
        return self._hf_layer(view.layer.layer_idx) is None

    def attach(self, module: torch.nn.Module, layer: KVLayer, model: torch.nn.Module | None = None) -> None:
        """Let codecs and policy of a layer that has seen rows take from its attention module what they need.

        `model` is the one that it belongs to, where that is not running.
        """
        from hf_kvcache.layer_context import context_of

        layer.bind(context_of(module, layer, self._ropes, model))

    def rebind(self) -> None:
        """Let another module with the same weights (a copy, a compiled model) go on with this cache."""
        super().rebind()
        for layer in self.layers:
            if isinstance(layer, KVLayer):
                layer.met = None

    # -- layers --------------------------------------------------------------------------------------------------------

    def _learn_layers(self, config) -> None:
        """Take from the model's config which layers are ours.

        Raises:
            ValueError: a policy that does not go with layers that have states beside rows.
        """
        self._hf_layers, self._n_states = compat.hf_layers(config), compat.n_states(config)
        if self.per_layer:
            from hf_kvcache.per_layer import check_model

            check_model(self)
        if self._n_states and self.policy is not None:
            self.policy.check_states()
        if (self.policy or self.codec) and all(layer is not None for layer in self._hf_layers):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in self._hf_layers}))
            warn_once(f"none of this model's layers is compressed: all keep what transformers has for them ({kinds})")

    def layer_for(self, module: torch.nn.Module) -> KVLayer:
        """The layer that an attention module will fill, before it does."""
        if self._hf_layers is None:
            self._learn_layers(module.config)
        self._add_layers(module.layer_idx + 1)
        layer = self.layers[module.layer_idx]
        if self.offloading and layer.is_initialized and layer.device.type == "cuda":
            self._prefetch_ahead(module.layer_idx, layer.device)
        return layer

    def _add_layers(self, n_layers: int) -> None:
        while len(self.layers) < n_layers:
            self.layers.append(self._new_layer(len(self.layers)))

    def _new_layer(self, layer_idx: int):
        hf_layer = self._hf_layer(layer_idx)
        if hf_layer is not None:
            return hf_layer
        n_layers = None if self._hf_layers is None else len(self._hf_layers)
        if n_layers is not None and layer_idx >= n_layers and any(self._hf_layers):
            raise ValueError(
                f"the model has {n_layers} layers by its config and asks for layer {layer_idx} of the cache: construct "
                f"{type(self).__name__}(..., config=model.config), so that it can add what it needs"
            )
        codec = self.codec_of_layer(layer_idx, n_layers) or (None, None)
        layer = self.make_layer(layer_idx, codec)
        if self._records_past:
            layer.activate_past_recording()
        return layer

    def make_layer(self, layer_idx: int, codec: tuple[Codec | None, Codec | None]) -> KVLayer:
        """A layer of ours without rows, of the kind that the policy and the model ask for."""
        settings = self.settings_of_layer(layer_idx)
        policy, options = settings.policy, settings.sizes
        kind = None if policy is None else policy.layer_type()
        if layer_idx in self._n_states:
            from hf_kvcache.stateful import StatefulLayer

            kind, options["n_states"] = StatefulLayer, self._n_states[layer_idx]
        return (kind or KVLayer)(layer_idx, *codec, policy, **options)

    def _hf_layer(self, layer_idx: int):
        """transformers' own layer for this index, or None where ours serves (or the model is not known yet)."""
        hf_layers = self._hf_layers or ()
        hf_layer = hf_layers[layer_idx] if layer_idx < len(hf_layers) else None
        if self._records_past and hasattr(hf_layer, "activate_past_recording"):
            hf_layer.activate_past_recording()
        return hf_layer

    @property
    def first_layer(self) -> int:
        """Index of the first layer that is ours: the one that identifies the model."""
        return next((i for i, layer in enumerate(self.layers) if isinstance(layer, KVLayer)), 0)

    def __repr__(self) -> str:
        parts = [f"{name}={value!r}" for name, value in (("policy", self.policy), ("codec", self.codec)) if value]
        parts.append(f"{len(self.layers)} layers, {self.get_seq_length()} tokens, {self.nbytes} bytes")
        return f"{type(self).__name__}({', '.join(parts)})"
