"""A cache as plain values, and back: what `config.json` says of it."""

from __future__ import annotations

from hf_kvcache.cache import KVCache

_PLAIN = ("window", "n_sink", "min_length", "exact_prefill", "rerotate_keys", "edge_layers", "max_length")


def spec_of(cache: KVCache) -> dict:
    """The arguments that make an empty cache like this one, as JSON has them.

    Returns:
        `policy`, `codec` and `edge_codec` as their `spec()`, those of `per_layer`, too, the other arguments of
        `KVCache` as they are, and only what is not their default.

    Raises:
        ValueError: it is offloaded, which goes with a machine and not with a model.
    """
    if cache.offloading:
        raise ValueError("offloading=True goes with a machine; leave it out of what is exported")
    plain = KVCache()
    spec = {name: getattr(cache, name) for name in _PLAIN if getattr(cache, name) != getattr(plain, name)}
    if cache.policy is not None:
        spec["policy"] = cache.policy.spec()
    for name in ("codec", "edge_codec"):
        if getattr(cache, name) is not None:
            spec[name] = [side.spec() for side in getattr(cache, name)]
    if cache.per_layer:
        spec["per_layer"] = {str(i): _described(options) for i, options in cache.per_layer.items()}
    return spec


def _described(options: dict) -> dict:
    """Options of a layer, the codecs as their `spec()`."""
    pair = options.get("codec")
    return options if pair is None else options | {"codec": [side.spec() for side in pair]}


def cache_of(spec: dict, **options) -> KVCache:
    """An empty cache of what `spec_of` returned.

    Args:
        spec: see there.
        options: further arguments of `KVCache`, such as `config`.

    Raises:
        ValueError, TypeError: the spec says something impossible, or speaks of what this code does not have.
    """
    arguments = dict(spec)
    make_parts(arguments)
    return KVCache(**arguments, **options)


def make_parts(arguments: dict) -> None:
    """Put a policy and codecs in the place of what describes them."""
    if arguments.get("policy") is not None:
        from hf_kvcache.policies.base import policy_from_spec

        arguments["policy"] = policy_from_spec(arguments["policy"])
    for name in ("codec", "edge_codec"):
        if name in arguments:
            arguments[name] = _pair(arguments[name])
    if "per_layer" in arguments:
        layers = {int(i): dict(options) for i, options in arguments["per_layer"].items()}
        for options in layers.values():
            if "codec" in options:
                options["codec"] = _pair(options["codec"])
        arguments["per_layer"] = layers


def _pair(specs: list | None) -> tuple | None:
    from hf_kvcache.codecs.base import codec_from_spec

    return None if specs is None else tuple(codec_from_spec(side) for side in specs)
