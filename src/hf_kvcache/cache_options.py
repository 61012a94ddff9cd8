"""Which options of a cache go together; what only one part can know is asked of that part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_kvcache.codecs.fitted import layers_per_row
from hf_kvcache.layer_settings import settings_of

if TYPE_CHECKING:
    from hf_kvcache.codecs.base import Codec


def codec_pair(codec) -> tuple[Codec, Codec] | None:
    """Codecs of keys and values out of one for both, a pair, or None.

    Raises:
        TypeError: something else was given.
    """
    keys, values = codec if isinstance(codec, tuple) else (codec, codec)
    if keys is None and values is None:
        return None
    from hf_kvcache.codecs.base import Codec

    for side in (keys, values):
        if not isinstance(side, Codec):
            raise TypeError(f"codec must be a Codec such as Quantize(bits=4), or a pair of them, not {codec!r}")
    return keys.for_side("k"), values.for_side("v")


def check_options(cache, offloading: bool) -> None:
    """Refuse options of a cache that contradict each other or do nothing.

    Raises:
        TypeError: the policy is none.
        ValueError: the message names both options.
    """
    sizes = {name: getattr(cache, name) for name in ("window", "n_sink", "edge_layers", "min_length")}
    if min(sizes.values()) < 0:
        raise ValueError(f"{', '.join(f'{name}={n}' for name, n in sizes.items())}: they must not be negative")
    policy = cache.policy
    if policy is not None:
        from hf_kvcache.policies.base import Policy

        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be a Policy such as KeyDiff(budget=1024), not {policy!r}")
    _check_use(cache)
    for pair in (cache.codec, cache.edge_codec if cache.edge_layers else None):
        check_pair(cache, pair)
    if cache.rerotate_keys and policy is None:
        raise ValueError("rerotate_keys=True closes the gaps that eviction leaves, and without a policy there are none")
    if cache.rerotate_keys and cache.all_codecs:
        raise ValueError(f"rerotate_keys=True rotates keys again at every eviction, which {cache.all_codecs[0]} cannot")
    if policy is not None:
        for pair in (cache.codec, *((cache.edge_codec,) if cache.edge_layers else ())):
            policy.check_cache(settings_of(cache, pair, {}))
    if cache.per_layer:
        from hf_kvcache.per_layer import check_layers

        check_layers(cache)
    if any(layers_per_row(side) > 1 for side in cache.all_codecs):
        from hf_kvcache.stores.shared import check_sharing

        check_sharing(cache, offloading)


def _check_use(cache) -> None:
    """Refuse arguments that would do nothing."""
    if cache.edge_codec is not None and not cache.edge_layers:
        raise ValueError("edge_codec is the codec of the first and last layers: say how many with edge_layers")
    if not cache.all_codecs and not cache.exact_prefill:
        raise ValueError("exact_prefill=False lets attention read what the codec makes of a prompt: there is none")
    if not cache.all_codecs and cache.min_length:
        raise ValueError(f"min_length={cache.min_length} delays packing, and without a codec nothing is packed")
    if cache.codec is None and cache.edge_codec is None and cache.edge_layers:
        raise ValueError(f"edge_layers={cache.edge_layers} exempts layers from the codec, and there is none")


def check_pair(cache, pair: tuple[Codec, Codec] | None) -> None:
    """Refuse codecs of keys and values that the other options of a cache do not go with.

    Raises:
        ValueError: the message names both.
    """
    for side in pair or ():
        if not cache.exact_prefill and (side.granularity > 1 or "queries" in side.needs):
            raise ValueError(f"exact_prefill=False encodes every token as it comes, which {side} cannot")
    if cache.policy is not None:
        for side in pair or ():
            cache.policy.check_codec(side, cache)
