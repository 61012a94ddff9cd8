"""The named caches: a policy and a codec under the name people look for."""

from __future__ import annotations

from hf_kvcache import registry
from hf_kvcache.cache import KVCache
from hf_kvcache.codecs import Quantize
from hf_kvcache.policies.base import Policy


class DenseCache(KVCache):
    """Lossless: `KVCache()` under the name that the command line uses."""


class QuantCache(KVCache):
    """Keys per channel in blocks of 32 tokens, values per token, recent window dense (KIVI, Liu et al. 2024).

    Args:
        bits: 8, 4, 3 or 2.
        window: newest tokens in full precision; up to 31 more wait there for their block.
        rotate: mix channels by a Hadamard matrix before rounding (QuaRot, Ashkboos et al. 2024).
        key_axis: "channel", or "token" to make rows independent (needed under an eviction policy; ruins models with
            large key biases).
        group_size: channels per value scale; None picks 64, or 32 at 2 bits.
        edge_layers: this many first and last layers get `edge_bits`.
        edge_bits: bits of those layers.
        **kwargs: `policy`, `n_sink`, `max_length`, `config`, `offloading` of `KVCache`.
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        window: int = 64,
        rotate: bool = False,
        key_axis: str | None = None,
        group_size: int | None = None,
        edge_layers: int = 0,
        edge_bits: int = 8,
        **kwargs,
    ):
        if key_axis is None:
            key_axis = "channel" if kwargs.get("policy") is None else "token"
        self.edge_layers = edge_layers
        pair = self._codecs(bits, key_axis, group_size, rotate)
        self.edge_codec = self._pair(self._codecs(edge_bits, key_axis, group_size, rotate))
        super().__init__(codec=pair, window=window, **kwargs)

    @staticmethod
    def _codecs(bits, key_axis, group_size, rotate):
        return (
            Quantize(bits, axis=key_axis, group_size=group_size if key_axis == "token" else None, rotate=rotate),
            Quantize(bits, axis="token", group_size=group_size, rotate=rotate),
        )

    def codec_of_layer(self, layer_idx, n_layers):
        if not self.edge_layers or n_layers is None:
            # only layer 0 is ever created before the model is known
            return self.edge_codec if self.edge_layers and layer_idx == 0 else self.codec
        is_edge = layer_idx < self.edge_layers or layer_idx >= n_layers - self.edge_layers
        return self.edge_codec if is_edge else self.codec


class EvictionCache(KVCache):
    """Keep the tokens that a policy chooses, within a budget.

    Args:
        policy: name of an eviction method (`hf-kvcache methods`), or a `Policy`.
        codec: also encode what stays, with a row-granular codec.
        window, max_length, config, offloading: see `KVCache`.
        **knobs: arguments of the policy: `budget=1024` or `ratio=0.25`, `n_sink`, `n_recent`, `decode`, ...
    """

    def __init__(
        self, policy: str | Policy, *, codec=None, window=64, max_length=None, config=None, offloading=False, **knobs
    ):
        if isinstance(policy, str):
            kind = registry.load(registry.method(policy).factory)
            if not issubclass(kind, Policy):
                raise ValueError(f"{policy!r} is not an eviction method")
            policy = kind(**knobs)
        elif knobs:
            raise TypeError(f"{', '.join(knobs)}: give the arguments of a policy to the policy itself")
        super().__init__(policy, codec, window=window, max_length=max_length, config=config, offloading=offloading)
