"""All that one layer of a cache is made of: what the cache has, and what the layer has instead."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_kvcache.codecs.base import Codec
    from hf_kvcache.policies.base import Policy

BUDGETS = ("ratio", "budget")
_SIZES = ("window", "n_sink", "min_length", "max_length", "exact_prefill", "rerotate_keys")


@dataclass(frozen=True)
class LayerSettings:
    """All that one layer is made of; attributes as in `KVCache`."""

    policy: Policy | None
    codec: tuple[Codec, Codec] | None
    window: int
    n_sink: int
    min_length: int
    max_length: int | None
    exact_prefill: bool
    rerotate_keys: bool

    @property
    def all_codecs(self) -> list[Codec]:
        """Codecs of keys and values."""
        return list(self.codec or ())

    @property
    def sizes(self) -> dict:
        """What a layer takes beside policy and codecs."""
        return {name: getattr(self, name) for name in _SIZES}


def settings_of(cache, codec: tuple[Codec, Codec] | None, options: dict) -> LayerSettings:
    """What a layer is made of that has `codec` and these options, and all else of the cache."""
    policy = cache.policy
    if "policy" in options:
        policy = None
    elif given := {name: options[name] for name in BUDGETS if name in options}:
        policy = with_budget(policy, **given)
    own = {name: options.get(name, getattr(cache, name)) for name in _SIZES}
    return LayerSettings(policy, options.get("codec", codec), **own)


def with_budget(policy: Policy, **given) -> Policy:
    """A policy with another `budget` or `ratio`, those that it wraps included."""
    knobs = dict.fromkeys(BUDGETS) | given
    scorer = getattr(policy, "scorer", None)
    return replace(policy, **knobs) if scorer is None else replace(policy, **knobs, scorer=with_budget(scorer, **given))


class PerLayer:
    """The part of a cache that says what each of its layers is made of."""

    @property
    def all_codecs(self) -> list[Codec]:
        """Codecs of keys and values, of the first and last layers and of single ones, too."""
        pairs = self.codec, self.edge_codec, *(options.get("codec") for options in self.per_layer.values())
        return [side for pair in pairs for side in pair or ()]

    def codec_of_layer(self, layer_idx: int, n_layers: int | None) -> tuple[Codec, Codec] | None:
        """The pair of codecs of one layer; `n_layers` is None while the model is not known yet."""
        if "codec" in (own := self.per_layer.get(layer_idx, {})):
            return own["codec"]
        if not self.edge_layers:
            return self.codec
        # only layer 0 is ever created before the model is known
        is_last = n_layers is not None and layer_idx >= n_layers - self.edge_layers
        return self.edge_codec if layer_idx < self.edge_layers or is_last else self.codec

    def layers_with_codec(self) -> list[int]:
        """Layers that have `codec`, once the model is known."""
        ours = [i for i, layer in enumerate(self._hf_layers) if layer is None]
        return [i for i in ours if self.codec_of_layer(i, len(self._hf_layers)) is self.codec]

    def settings_of_layer(self, layer_idx: int, n_layers: int | None = None) -> LayerSettings:
        """All that one layer is made of; `n_layers` is None while the model is not known yet."""
        return settings_of(self, self.codec_of_layer(layer_idx, n_layers), self.per_layer.get(layer_idx, {}))
