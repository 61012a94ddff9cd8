"""The cache: a list of layers that compress themselves."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import torch
from transformers import Cache

from hf_kvcache import compat, persist, pickling
from hf_kvcache.attention.handed import Handed, note_lender
from hf_kvcache.attention.interface import register_pass_throughs
from hf_kvcache.codecs.base import ROWS, Codec
from hf_kvcache.compat import LinearAttentionLayer
from hf_kvcache.host import Host
from hf_kvcache.layer import KVLayer, batch_indices
from hf_kvcache.policies.base import Policy
from hf_kvcache.slots import SlotLayer, refuse_recording
from hf_kvcache.stateful import StatefulLayer
from hf_kvcache.stores.shared import SharedStore
from hf_kvcache.stores.uniform import PACK_STEP
from hf_kvcache.view import KVView
from hf_kvcache.warn import warn_once


class KVCache(Cache):
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
        min_length: tokens below which nothing is packed: a short cache is small, and dense rows are read faster.
        exact_prefill: attend to new tokens as they are and compress them afterwards. False attends to what the codec
            makes of them from the start, as published evaluations of low-rank caches do.
        compact: give the rows that stay neighbouring positions, as if the evicted ones had never been there: their keys
            are rotated at every eviction. By default rows keep the positions of the text. In float16 and bfloat16 the
            cache then keeps keys twice, as they were appended and as they stand, because a key that is rotated and
            rounded again and again would lose its direction.
        max_length: tokens to make room for at the first call, instead of growing.
        config: the model's config. Only models with linear-attention layers need it (hybrids such as Qwen3-Next);
            others are recognised when the cache is first used.
        offloading: keep layers in CPU memory and bring them to the GPU one ahead of their turn (CUDA only).

    Raises:
        ValueError: a policy that drops single tokens over a codec that packs them in blocks; a budget, `min_length` or
            `edge_layers` with which nothing would be done.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        codec: Codec | tuple[Codec, Codec] | None = None,
        *,
        window: int = 64,
        n_sink: int = 0,
        edge_layers: int = 0,
        edge_codec: Codec | tuple[Codec, Codec] | None = None,
        min_length: int = 0,
        exact_prefill: bool = True,
        compact: bool = False,
        max_length: int | None = None,
        config=None,
        offloading: bool = False,
    ):
        register_pass_throughs()
        self.policy, self.window, self.n_sink = policy, window, n_sink
        self.min_length, self.exact_prefill, self.max_length = min_length, exact_prefill, max_length
        self.compact = compact
        # whether more of the prompt follows this call; None means that nobody has said (see `prefill`)
        self.prompt_goes_on: bool | None = None
        sizes = dict(window=window, n_sink=n_sink, edge_layers=edge_layers, min_length=min_length)
        if min(sizes.values()) < 0:
            raise ValueError(f"{', '.join(f'{name}={n}' for name, n in sizes.items())}: they must not be negative")
        if policy is not None and not isinstance(policy, Policy):
            raise TypeError(f"policy must be a Policy such as KeyDiff(budget=1024), not {policy!r}")
        self.codec = self._pair(codec)
        self.edge_layers, self.edge_codec = edge_layers, self._pair(edge_codec)
        self._check_use()
        for pair in (self.codec, self.edge_codec if edge_layers else None):
            self._check_pair(pair)
        self._check_policy()
        self._check_sharing(offloading)
        self._model: weakref.ref | None = None
        self._expected: dict | None = None
        self._stock: list | None = None
        self._records_past = False
        # what a model has got as tensors and attention has not been called with yet
        self.handed: Handed | None = None
        # layers hold them: when the last one forgets its text, they go
        self._ropes = weakref.WeakValueDictionary()
        self._n_states: dict[int, int] = {}
        if config is not None:
            self._learn_layers(config)
        super().__init__(layers=[], offloading=offloading, offload_only_non_sliding=True)
        while self._stock is not None and len(self.layers) < len(self._stock):
            self.layers.append(self._new_layer(len(self.layers)))

    def _learn_layers(self, config) -> None:
        """Take from the model's config which layers are ours.

        Raises:
            ValueError: decisions of a retrofit for layers that have states beside rows.
        """
        self._stock, self._n_states = compat.stock_layers(config), compat.n_states(config)
        if self._n_states and self.policy is not None and self.policy.decides:
            raise ValueError(f"{type(self.policy).__name__} does not go with layers that have linear attention, too")
        does_something = self.policy is not None or self.codec is not None
        if does_something and all(layer is not None for layer in self._stock):
            kinds = sorted({type(layer).__name__ for layer in self._stock})
            warn_once(
                f"none of this model's layers is compressed: all of them keep what transformers has for them "
                f"({', '.join(kinds)}), such as a sliding window"
            )

    @staticmethod
    def _pair(codec) -> tuple[Codec, Codec] | None:
        keys, values = codec if isinstance(codec, tuple) else (codec, codec)
        if keys is None and values is None:
            return None
        for side in (keys, values):
            if not isinstance(side, Codec):
                raise TypeError(f"codec must be a Codec such as Quantize(bits=4), or a pair of them, not {codec!r}")
        return keys.for_side("k"), values.for_side("v")

    def _check_use(self) -> None:
        """Refuse arguments that would do nothing."""
        if self.edge_codec is not None and not self.edge_layers:
            raise ValueError("edge_codec is the codec of the first and last layers: say how many with edge_layers")
        if self.codec is None and not self.exact_prefill:
            raise ValueError("exact_prefill=False lets attention read what the codec makes of a prompt: there is none")
        if self.codec is None and self.min_length:
            raise ValueError(f"min_length={self.min_length} delays packing, and without a codec nothing is packed")
        if self.codec is None and self.edge_codec is None and self.edge_layers:
            raise ValueError(f"edge_layers={self.edge_layers} exempts layers from the codec, and there is none")

    def _check_pair(self, pair) -> None:
        for side in pair or ():
            if not self.exact_prefill and (side.granularity > 1 or "queries" in side.needs):
                raise ValueError(f"exact_prefill=False encodes every token as it comes, which {side} cannot")
        if self.policy is None or pair is None:
            return
        for side in pair:
            if side.shares_rows:
                raise ValueError(
                    f"{type(self.policy).__name__} drops tokens head by head, but {side} shares rows among heads; "
                    "use group_size=1"
                )
            if side.granularity > 1:
                raise ValueError(
                    f"{type(self.policy).__name__} drops single tokens, but {side} packs {side.granularity} tokens "
                    'together; use a row-granular codec, such as Quantize(axis="token")'
                )
        if self.policy.budget is not None and self.min_length > self.policy.budget:
            raise ValueError(
                f"{type(self.policy).__name__}: budget={self.policy.budget} is below min_length={self.min_length}, so "
                "nothing would ever be packed"
            )
        n_dense = self.n_sink + self.window + PACK_STEP
        if self.policy.budget is not None and self.policy.budget < n_dense + self.policy.n_sink:
            raise ValueError(
                f"{type(self.policy).__name__}: budget={self.policy.budget} leaves no room for packed rows beside up "
                f"to {n_dense} dense ones (n_sink={self.n_sink} + window={self.window} + {PACK_STEP} waiting) and its "
                f"{self.policy.n_sink} sinks; raise budget or lower window"
            )

    def _check_policy(self) -> None:
        """Refuse what this policy cannot go with."""
        name, codecs = (
            type(self.policy).__name__,
            [side for pair in (self.codec, self.edge_codec) for side in pair or ()],
        )
        if self.compact and self.policy is None:
            raise ValueError("compact=True closes the gaps that eviction leaves, and without a policy there are none")
        if self.compact and codecs:
            raise ValueError(f"compact=True rotates keys again at every eviction, which {codecs[0]} cannot")
        if self.policy is None:
            return
        if self.policy.folds and codecs:
            raise ValueError(f"{name} changes rows that stay, which {codecs[0]} has packed; use it without a codec")
        if not self.policy.is_ragged:
            return
        if self.policy.decides:
            self._check_learned()
        for side in codecs:
            if side.format not in ROWS:
                raise ValueError(
                    f"{name} lets heads keep different numbers of rows, in pages that serve any head, which rows of "
                    f"{side} do not"
                )
        for what, n in (("n_sink", self.n_sink), ("min_length", self.min_length)):
            if n:
                raise ValueError(
                    f"{name}: {what}={n} of the cache does not go with pages; the policy has its own n_sink"
                )
        n_dense = self.window + PACK_STEP
        if self.policy.budget is not None and self.policy.budget < n_dense + self.policy.n_sink:
            raise ValueError(
                f"{name}: budget={self.policy.budget} leaves nothing to choose beside up to {n_dense} dense rows "
                f"(window={self.window} + {PACK_STEP} waiting) and {self.policy.n_sink} sinks; raise it or lower window"
            )

    def _check_learned(self) -> None:
        """Refuse what the decisions of a model leave nothing to do for."""
        given = {
            "compact": self.compact,
            "max_length": self.max_length is not None,
            "exact_prefill": not self.exact_prefill,
        }
        for name, is_given in given.items():
            if is_given:
                raise ValueError(
                    f"{type(self.policy).__name__}: the model decides how many rows there are, and places them itself; "
                    f"{name}= does not go with that"
                )

    def _check_sharing(self, offloading: bool) -> None:
        """Refuse what layers that share their packed rows cannot do."""
        if any(side.share_layers > 1 for side in self.edge_codec or ()):
            raise ValueError("edge_codec: the first and last layers are no neighbours, so they share no latents")
        if self.codec is None or all(side.share_layers == 1 for side in self.codec):
            return
        keys, values = self.codec
        if keys.share_layers != values.share_layers:
            raise ValueError(
                f"keys of {keys.share_layers} layers and values of {values.share_layers} would share rows: give both "
                "sides the same share_layers"
            )
        refused = {
            f"{type(self.policy).__name__} drops tokens layer by layer": self.policy is not None,
            "offloading moves layers one by one": offloading,
            "exact_prefill=False projects a layer before the next one has rows": not self.exact_prefill,
        }
        for why, is_asked in refused.items():
            if is_asked:
                raise ValueError(f"share_layers={keys.share_layers} keeps one row for several layers, but {why}")

    def codec_of_layer(self, layer_idx: int, n_layers: int | None) -> tuple[Codec, Codec] | None:
        """The pair of codecs of one layer; `n_layers` is None while the model is not known yet."""
        if not self.edge_layers:
            return self.codec
        # only layer 0 is ever created before the model is known
        is_last = n_layers is not None and layer_idx >= n_layers - self.edge_layers
        return self.edge_codec if layer_idx < self.edge_layers or is_last else self.codec

    def _new_layer(self, layer_idx: int):
        stock = self._stock_layer(layer_idx)
        if stock is not None:
            return stock
        if self._stock is not None and layer_idx >= len(self._stock) and any(self._stock):
            raise ValueError(
                f"the model has {len(self._stock)} layers by its config and asks for layer {layer_idx} of the cache: "
                f"construct {type(self).__name__}(..., config=model.config), so that it can add what it needs"
            )
        codec = self.codec_of_layer(layer_idx, None if self._stock is None else len(self._stock)) or (None, None)
        layer = self.make_layer(layer_idx, codec)
        if self._records_past:
            layer.activate_past_recording()
        return layer

    def make_layer(self, layer_idx: int, codec: tuple[Codec | None, Codec | None]) -> KVLayer:
        """A layer of ours without rows, of the kind that the policy and the model ask for."""
        kind, options = SlotLayer if self.policy is not None and self.policy.decides else KVLayer, {}
        if layer_idx in self._n_states:
            kind, options = StatefulLayer, {"n_states": self._n_states[layer_idx]}
        return kind(
            layer_idx,
            *codec,
            self.policy,
            window=self.window,
            n_sink=self.n_sink,
            min_length=self.min_length,
            max_length=self.max_length,
            exact_prefill=self.exact_prefill,
            compact=self.compact,
            **options,
        )

    def _stock_layer(self, layer_idx: int):
        """transformers' own layer for this index, or None where ours serves (or the model is not known yet)."""
        stock = self._stock[layer_idx] if self._stock is not None and layer_idx < len(self._stock) else None
        if self._records_past and hasattr(stock, "activate_past_recording"):
            stock.activate_past_recording()
        return stock

    # -- the walk ----------------------------------------------------------------------------------------------------

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """Append `[B, Hkv, S, D]` to a layer; returns a `KVView` and its values, or tensors for layers not ours."""
        self._end_handing_out()
        while len(self.layers) <= layer_idx:
            self.layers.append(self._new_layer(len(self.layers)))
        layer = self.layers[layer_idx]
        if self.offloading and key_states.is_cuda:
            self._prefetch_ahead(layer_idx, key_states.device)
        if self._stock is None and isinstance(layer, SlotLayer) and layer.call is None and not layer.tokens_seen:
            # the first layer of a model that may turn out to have a window there, see `bind`
            keys = KVView(layer, key_states, value_states, is_prefill=True)
            values = keys.values
        else:
            keys, values = layer.update(key_states, value_states, *args, **kwargs)
        if isinstance(keys, KVView):
            keys.cache = self
        return keys, values

    def bind(self, module: torch.nn.Module, view: KVView) -> bool:
        """Learn the model from the attention module that reads `view`; called at every attention call.

        Returns:
            False if the layer belongs to transformers' own class (sliding window, ...): it has taken the rows over.

        Raises:
            ValueError: the cache holds tokens of another model.
        """
        layer_idx = view.layer.layer_idx
        if self._stock is None:
            self._learn_layers(module.config)
        if layer_idx in self._n_states and not isinstance(view.layer, StatefulLayer):
            # the first layer of such a model: attention comes before linear attention
            raise ValueError(self._lacks_config)
        stock = self._stock_layer(layer_idx)
        if stock is not None:
            stock.update(view.new_k, view.new_v)
            self.layers[layer_idx] = stock
            return False
        if view.layer.decides and view.layer.call is None:
            raise ValueError(view.layer.lacks_decisions)
        if layer_idx == self.first_layer:
            known = self._model() if self._model is not None else None
            if known is not None and known is not module and not view.is_prefill:
                raise ValueError(
                    "this cache holds tokens of another model; use a new cache, reset() this one, or say rebind() "
                    "if the two models really share their weights"
                )
            if self._expected is not None:
                self.check_model(module, "the loaded cache")
            if self._model is None:
                _warn_of_length(module)
            self._model = weakref.ref(module)
        if view.layer.needs_model:
            self.attach(module, view.layer)
            if isinstance(view.layer.store, SharedStore) and not view.layer.store.group:
                self._share(layer_idx)
        return True

    def hand_out(self, view: KVView) -> None:
        """A model computes with the rows of `view` itself, before it calls attention or instead of calling it.

        Raises:
            ValueError: the layer needs the queries, the positions or the features of the model, which come too late.
        """
        view.layer.check_expandable()
        self.handed = Handed(view.layer.layer_idx, view.n_new, view.is_prefill)
        note_lender(self)
        view.layer.defer()

    def take_back(self) -> KVView:
        """Attention has been called with what was handed out: the view of that layer."""
        (layer_idx, n_new, is_prefill), self.handed = self.handed, None
        layer = self.layers[layer_idx]
        view = KVView(layer, *(layer.store.dense[side][:, :, -n_new:] for side in "kv"), is_prefill)
        view.cache = self
        return view

    def _end_handing_out(self) -> None:
        """The next rows come: a layer whose tensors no attention function has got is of a model with its own attention.

        Raises:
            ValueError: the layer would have to choose tokens, or needs something of the model.
        """
        if self.handed is None:
            return
        layer, self.handed = self.layers[self.handed.layer_idx], None
        refused = [type(layer.policy).__name__] if layer.policy is not None else []
        refused += [codec for codec in layer.codecs if layer.needs_model and "model" in codec.needs]
        refused += [f"edge_layers={self.edge_layers}"] if self.edge_layers and self._stock is None else []
        if refused:
            raise ValueError(
                f"layer {layer.layer_idx}: the attention of this model reads keys and values itself instead of calling "
                f"a function of transformers' registry, so {refused[0]} cannot be served: use a cache that keeps all "
                "tokens and asks nothing of the model, such as KVCache(), QuantCache(8) or SparseCache(0.5)"
            )

    def holds(self, view: KVView) -> bool:
        """Whether the rows of `view` are in a layer that is ours, asked once the layer's own module has read it."""
        return self._stock_layer(view.layer.layer_idx) is None

    def layer_for(self, module: torch.nn.Module) -> KVLayer:
        """The layer that an attention module will fill, before it does."""
        if self._stock is None:
            self._learn_layers(module.config)
        while len(self.layers) <= module.layer_idx:
            self.layers.append(self._new_layer(len(self.layers)))
        layer = self.layers[module.layer_idx]
        if self.offloading and layer.is_initialized and layer.device.type == "cuda":
            self._prefetch_ahead(module.layer_idx, layer.device)
        return layer

    def attach(self, module: torch.nn.Module, layer: KVLayer, model: torch.nn.Module | None = None) -> None:
        """Let codecs and policy of a layer that has seen rows take from its attention module what they need.

        `model` is the one that it belongs to, where that is not running.
        """
        sizes = layer.n_kv_heads, layer.head_dim, layer.dtype, layer.device
        stock = compat.stock_layers(module.config)
        # a model that runs its layers several times has more in its cache than its config says
        n_layers = max(len(stock), layer.layer_idx + 1)
        ours = [i for i in range(n_layers) if i >= len(stock) or stock[i] is None]
        depth = ours.index(layer.layer_idx), len(ours)
        layer.bind(Host(module, layer.layer_idx, *sizes, self._ropes, depth, model))

    def _share(self, layer_idx: int) -> None:
        """Let a layer that shares its packed rows join its group: neighbours among the layers with that codec."""
        n_layers = len(self._stock)
        sharing = [
            i for i, stock in enumerate(self._stock) if stock is None and self.codec_of_layer(i, n_layers) is self.codec
        ]
        store = self.layers[layer_idx].store
        place, most = sharing.index(layer_idx), store.keys.share_layers
        group = sharing[place - place % most :][:most]
        devices = {self.layers[i].device for i in group[: group.index(layer_idx) + 1]}
        if len(devices) > 1:
            raise ValueError(
                f"layers {group[0]} to {layer_idx} share rows, and lie on {' and '.join(sorted(map(str, devices)))}; "
                "place them on one device, or use a smaller share_layers"
            )
        store.join(self.layers[group[0]].store, len(group))

    def rebind(self) -> None:
        """Let another module with the same weights (a copy, a compiled model) go on with this cache."""
        self._model = self._expected = None

    @property
    def fingerprint(self) -> dict | None:
        """What identifies the model whose tokens these are; None before the first use or when the model is gone."""
        module = self._model() if self._model is not None else None
        return self._expected if module is None else self._fingerprint(module)

    def _fingerprint(self, module: torch.nn.Module) -> dict:
        return persist.fingerprint(module) | persist.whose(self.layers[self.first_layer], module)

    def expect(self, model: dict | None) -> None:
        """Refuse models with another fingerprint from now on."""
        self._expected = model

    def check_model(self, module: torch.nn.Module, what: str) -> None:
        """Raise `CacheFileError` unless `module` is of the model that `what` was made with."""
        found = self._fingerprint(module)
        if self._expected is not None and found != self._expected:
            either = found | self._expected
            differing = ", ".join(key for key in either if found.get(key) != self._expected.get(key))
            raise persist.CacheFileError(f"{what} was made with another model (differs in: {differing})")
        self._expected = None

    def save(self, directory: str | os.PathLike) -> Path:
        """Write the cache to a folder, atomically; `KVCache.load` goes on from there, and this cache goes on as it was.

        Written are the rows in use of every layer, what policies and codecs remember, what still waits to be evicted or
        packed, the options of the cache and a fingerprint of the model. Bases that were given as `LowRank(bases=...)`
        stay behind: the rows of this text go on without them, another text does not. Under tensor parallelism every
        process writes a folder of its own, and reads it again.

        Returns:
            The folder, with `manifest.json` and one safetensors file.

        Raises:
            ValueError: a forward pass is under way, the model that filled the cache is gone, or something that the
                cache holds cannot be written down.
        """
        return persist.save(self, directory)

    @staticmethod
    def load(directory: str | os.PathLike, model=None, device=None) -> KVCache:
        """Read a cache that `save` wrote; the continuation is the same as without saving.

        Files are read as data: nothing in them is run, and everything is checked before a cache is made of it. The
        cache is of the class that was saved; `offloading` is only taken up on a GPU.

        Args:
            directory: the folder.
            model: the model to check against and to take the device from. Models with sliding-window layers need it;
                without it the check happens at the first forward pass.
            device: where to put the tensors.

        Raises:
            CacheFileError: files are missing, truncated, altered, contradict each other, are of another format version
                or of another model; the message names file and field.
        """
        return persist.load(KVCache, directory, model, device)

    def __reduce__(self):
        # as DynamicCache travels: `pickle`, `torch.save`, `multiprocessing`
        return pickling.reduced(self)

    def __deepcopy__(self, memo: dict) -> KVCache:
        return pickling.twin(self, memo)

    @property
    def first_layer(self) -> int:
        """Index of the first layer that is ours: the one that identifies the model."""
        return next((i for i, layer in enumerate(self.layers) if isinstance(layer, KVLayer)), 0)

    def after_attention(self, layer_idx: int) -> None:
        """Called once a layer has settled: its bytes may leave the GPU now."""
        if self.offloading and self.layers[layer_idx].device.type == "cuda":
            self.offload(layer_idx, self.only_non_sliding)

    def _prefetch_ahead(self, layer_idx: int, device: torch.device) -> None:
        default = torch.cuda.default_stream(device)
        default.wait_stream(self.prefetch_stream)
        self.prefetch_stream.wait_stream(default)
        self.layers[layer_idx].prefetch()
        self.prefetch(layer_idx + 1, self.only_non_sliding)

    # -- what transformers asks of a cache ---------------------------------------------------------------------------

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take back what comes: while speculative decoding records, eviction waits for it."""
        return all(layer.is_croppable for layer in self.layers)

    def get_mask_sizes(self, query_length: int, *args, **kwargs) -> tuple[int, int]:
        if query_length == 0:
            # asked before any layer runs: the model's own reshape would fail with a riddle
            raise ValueError("the input is empty; a forward pass needs at least one token")
        return super().get_mask_sizes(query_length, *args, **kwargs)

    def activate_past_recording(self) -> None:
        """Let layers wait for `crop` before they evict or pack: speculative decoding begins.

        Raises:
            ValueError: the decisions of a retrofitted model cannot be taken back.
        """
        if self.policy is not None and self.policy.decides:
            refuse_recording(self.policy)
        # layers are created as they are needed, so the flag must outlive this call
        self._records_past = True
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens in all layers, or raise and change none.

        Raises:
            ValueError: a layer has evicted tokens among them, or the number is positive.
        """
        ours = [layer for layer in self.layers if isinstance(layer, KVLayer)]
        for layer in ours:
            layer.check_crop(tokens_to_remove)
        for i, layer in enumerate(self.layers):
            if tokens_to_remove and not isinstance(layer, KVLayer) and isinstance(layer, LinearAttentionLayer):
                compat.check_states_crop(layer, f"layer {i}")
        # transformers' own layers change nothing but their attributes, and dictionaries among those
        before = [
            (layer, {name: dict(value) if isinstance(value, dict) else value for name, value in vars(layer).items()})
            for layer in self.layers
            if not isinstance(layer, KVLayer)
        ]
        try:
            for layer, _ in before:
                # of linear attention alone: those with a window crop that, too
                crop = compat.crop_states if type(layer) is LinearAttentionLayer else type(layer).crop
                crop(layer, tokens_to_remove)
        except Exception:
            for layer, attributes in before:
                vars(layer).update(attributes)
            raise
        for layer in ours:
            layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let every row of the batch go on from row `beam_idx` `[B]` of it: beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices) -> None:
        """Keep these rows of the batch, in this order, in all layers or in none.

        Args:
            indices: integers, `[B']` as a tensor, list or tuple; or a boolean mask `[B]`.

        Raises:
            IndexError: the cache has no such row.
            TypeError: something else than integers or a mask.
        """
        indices = batch_indices(indices, self.batch_size)
        for layer in self.layers:
            # transformers' own layers of linear attention have no other name for it
            layer.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times, copies side by side.

        Raises:
            ValueError: `repeats` is no positive number.
        """
        if repeats < 1:
            raise ValueError(f"repeats={repeats}: every row has to stay at least once")
        if self.batch_size > 0:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first token.

        Raises:
            ValueError: layers differ in it.
        """
        sizes = {
            (layer.batch_size if layer.is_initialized else -1)
            if isinstance(layer, KVLayer)
            else compat.stock_batch_size(layer)
            for layer in self.layers
        } - {-1}
        if len(sizes) > 1:
            raise ValueError(f"layers hold batches of {' and '.join(map(str, sorted(sizes)))} rows")
        return next(iter(sizes), -1)

    def reset(self) -> None:
        """Forget every token in all layers; the bytes are freed."""
        self.handed = None
        super().reset()
        for layer in self.layers:
            compat.drop_rows(layer)
        self.rebind()

    def has_previous_state(self, layer_idx: int | None = None, *args, **kwargs) -> bool:
        self._check_layers()
        return super().has_previous_state(layer_idx, *args, **kwargs)

    def get_conv_state(self, *args, **kwargs):
        self._check_layers()
        return super().get_conv_state(*args, **kwargs)

    def get_recurrent_state(self, *args, **kwargs):
        self._check_layers()
        return super().get_recurrent_state(*args, **kwargs)

    def update_conv_state(self, *args, **kwargs):
        self._check_layers()
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args, **kwargs):
        self._check_layers()
        return super().update_recurrent_state(*args, **kwargs)

    def update_indexer(self, *args, **kwargs):
        self._check_layers()
        return super().update_indexer(*args, **kwargs)

    def _check_layers(self) -> None:
        """Models with layers of linear attention, or of indexed attention, ask for those before attention is called.

        Raises:
            ValueError: the layers are not known yet.
        """
        if self._stock is None:
            raise ValueError(self._lacks_config)
        while len(self.layers) < len(self._stock):
            self.layers.append(self._new_layer(len(self.layers)))

    @property
    def _lacks_config(self) -> str:
        return (
            "this model has layers of linear or indexed attention, whose states belong to the cache from the start: "
            f"construct {type(self).__name__}(..., config=model.config)"
        )

    # -- bytes -------------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all layers: storages that exist, spare rows and metadata included."""
        ropes = set().union(*(layer.ropes for layer in self.layers if isinstance(layer, KVLayer)))
        layers = [layer.nbytes if isinstance(layer, KVLayer) else compat.stock_nbytes(layer) for layer in self.layers]
        return sum(layers) + sum(rope.nbytes for rope in ropes)

    @property
    def nbytes_dense(self) -> int:
        """Bytes that a dense cache of the same tokens would hold."""
        return sum(
            layer.nbytes_dense if isinstance(layer, KVLayer) else compat.stock_nbytes(layer) for layer in self.layers
        )

    @property
    def compression_ratio(self) -> float:
        """`nbytes_dense / nbytes`; 1.0 for an empty cache."""
        return self.nbytes_dense / self.nbytes if self.nbytes else 1.0

    def report(self) -> list[dict]:
        """One row per layer: class, tokens seen, rows kept, bytes, bytes of a dense cache."""
        return [
            {
                "layer": i,
                "class": type(layer).__name__,
                "tokens_seen": layer.get_seq_length() if hasattr(layer, "get_seq_length") else None,
                "n_kept": layer.store.n_kept if isinstance(layer, KVLayer) else None,
                "nbytes": layer.nbytes if isinstance(layer, KVLayer) else compat.stock_nbytes(layer),
                "nbytes_dense": layer.nbytes_dense if isinstance(layer, KVLayer) else compat.stock_nbytes(layer),
            }
            for i, layer in enumerate(self.layers)
        ]

    def __repr__(self) -> str:
        parts = [f"{name}={value!r}" for name, value in (("policy", self.policy), ("codec", self.codec)) if value]
        seen = self.get_seq_length() if self.layers else 0
        parts.append(f"{len(self.layers)} layers, {seen} tokens, {self.nbytes} bytes")
        return f"{type(self).__name__}({', '.join(parts)})"


def _warn_of_length(module: torch.nn.Module) -> None:
    length = compat.leaves_cache_at(module)
    if length is not None:
        warn_once(
            f"generate() of this model switches its longrope factors after {length} tokens: transformers "
            f"then drops the cache that it was given and goes on in a dense one of its own. Texts of up to {length} "
            "tokens, and forward passes outside of generate(), stay in this cache"
        )
