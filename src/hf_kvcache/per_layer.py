"""Options that single layers of a cache have of their own: read, and refused where they cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_kvcache.cache_options import check_pair, codec_pair
from hf_kvcache.layer_settings import BUDGETS, settings_of

if TYPE_CHECKING:
    from hf_kvcache.policies.base import Policy

SIZES = ("window", "n_sink", "min_length")
OPTIONS = ("codec", "policy", *BUDGETS, *SIZES)


def read_options(per_layer: dict | None) -> dict[int, dict]:
    """The argument `per_layer` of a cache, in the order of the layers, with codecs as pairs.

    Raises:
        TypeError: a layer that is no number, options that are no dictionary, or a codec that is none.
        ValueError: an option that layers do not have, a negative number, or two budgets.
    """
    found = {}
    for layer_idx, options in (per_layer or {}).items():
        if isinstance(layer_idx, bool) or not isinstance(layer_idx, int) or not isinstance(options, dict):
            raise TypeError(
                f"per_layer is a dictionary of layers, such as {{0: {{'window': 128}}}}, not "
                f"{{{layer_idx!r}: {options!r}}}"
            )
        where = f"per_layer[{layer_idx}]"
        if layer_idx < 0:
            raise ValueError(f"{where}: layers count from 0")
        if unknown := [name for name in options if name not in OPTIONS]:
            raise ValueError(f"{where}: layers have no option {unknown[0]!r} of their own; {', '.join(OPTIONS)}")
        if options.get("policy") is not None:
            raise ValueError(
                f"{where}: policy can be None there, which keeps all tokens; for another budget say ratio="
            )
        if sum(name in options for name in ("policy", *BUDGETS)) > 1:
            raise ValueError(f"{where}: give one of policy=None, ratio= and budget=")
        for name in SIZES:
            if name in options and (isinstance(options[name], bool) or not isinstance(options[name], int)):
                raise TypeError(f"{where}: {name}={options[name]!r} is no whole number")
            if options.get(name, 0) < 0:
                raise ValueError(f"{where}: {name}={options[name]} must not be negative")
        found[layer_idx] = dict(options)
        if "codec" in options:
            found[layer_idx]["codec"] = codec_pair(options["codec"])
    return dict(sorted(found.items()))


def check_layers(cache) -> None:
    """Refuse options of layers that do not go together, or with those of the cache.

    Raises:
        ValueError: the message names the layer and both.
    """
    for layer_idx, options in cache.per_layer.items():
        where = f"per_layer[{layer_idx}]"
        told = next((name for name in ("policy", *BUDGETS) if name in options), None)
        if told is not None:
            _check_policy(cache.policy, f"{where}: {told}={options[told]}")
        try:
            settings = settings_of(cache, cache.codec, options)
            check_pair(settings, settings.codec)
            if settings.policy is not None:
                settings.policy.check_cache(settings)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if settings.codec is None and settings.min_length and "min_length" in options:
            raise ValueError(f"{where}: min_length={settings.min_length} delays packing, and the layer has no codec")


def _check_policy(policy: Policy | None, what: str) -> None:
    if policy is None:
        raise ValueError(f"{what} is about a policy, and the cache has none")
    part = policy
    while part is not None:
        if part.sets_layer_budgets or part.is_trained:
            raise ValueError(f"{what}: {type(part).__name__} shares out tokens among layers itself")
        part = getattr(part, "scorer", None)


def check_model(cache) -> None:
    """Refuse layers that a model, once its layers are known, does not have.

    Raises:
        ValueError: the message names them.
    """
    n_layers = len(cache._hf_layers)
    for layer_idx in cache.per_layer:
        if layer_idx >= n_layers:
            raise ValueError(f"per_layer[{layer_idx}]: the model has {n_layers} layers")
        if cache._hf_layers[layer_idx] is not None:
            kind = type(cache._hf_layers[layer_idx]).__name__
            raise ValueError(f"per_layer[{layer_idx}]: that layer of the model is not compressed, it has a {kind}")
