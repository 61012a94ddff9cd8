"""What a repository needs of the library, by what its cache is made of."""

from __future__ import annotations

from collections.abc import Iterator

from hf_kvcache.attention.fused import op_of
from hf_kvcache.cache import KVCache
from hf_kvcache.codecs.base import Codec
from hf_kvcache.codecs.fitted import FittedCodec
from hf_kvcache.compat import hf_layers, n_states
from hf_kvcache.hub.flatten import PACKAGE, flat
from hf_kvcache.policies.base import Policy


def roots_of(cache: KVCache, adapter: dict | None = None, config=None) -> set[str]:
    """Modules that a repository must have that is to make caches like this one.

    Args:
        cache: empty.
        adapter: what the model carries for it, as its config says it (see `adapter_modules`), or None.
        config: of the repository's model, whose classes take the cache; None where it is for any model.
    """
    roots = {"hub.spec", "compat" if config is None else "hub.modeling_mixin"}
    parts, policy = [*_parts(cache)], cache.policy
    roots |= {_short(type(part).__module__) for part in parts}
    roots |= {_short(store.__module__) for part in parts if (store := part.store_type()) is not None}
    if config is None or any(hf_layers(config)) or n_states(config):
        roots |= {"hf_layers", "stateful"}
    if adapter is not None:
        roots.add(f"hub.{adapter['kind']}_module")
    elif any(isinstance(part, FittedCodec) and part.is_unfitted for part in parts):
        roots.add("codecs.fitting")
    for pair in (cache.codec, cache.edge_codec, *(options.get("codec") for options in cache.per_layer.values())):
        op = None if pair is None else op_of(*(codec.format for codec in pair))
        roots |= set() if op is None else {_short(op.__module__)}
    # what is asked of the model: its RoPE, and bases that hang on it
    asking = [part for part in parts if "model" in part.needs]
    if asking or cache.rerotate_keys:
        roots |= {"layer_context", "rope_of_model", "text_positions"}
    if any(isinstance(part, Codec) for part in asking):
        roots.add("adapters.modules")
    if asking or policy is not None:
        roots.add("attention.padding")
    if policy is not None:
        roots |= {"attention.kept_columns"} | ({"attention.pages"} if policy.is_ragged else set())
    roots |= {"per_layer"} if cache.per_layer else set()
    roots |= {"rerotation"} if cache.rerotate_keys else set()
    if any(getattr(part, "rotate", False) or getattr(part, "mix", False) for part in parts):
        roots.add("codecs.rotation")
    return {f"{PACKAGE}.{root}" for root in roots}


def _short(module: str) -> str:
    return module.removeprefix(f"{PACKAGE}.")


def classes_in(cache: KVCache) -> list[tuple[str, str]]:
    """Codecs and policies of a cache as a flat module and a name, sorted."""
    kinds = {type(part) for part in _parts(cache)}
    return sorted((flat(kind.__module__), kind.__name__) for kind in kinds)


def _parts(cache: KVCache) -> Iterator[Policy | Codec]:
    """Codecs and policies, those within others included."""
    todo = [cache.policy, *cache.all_codecs]
    while todo:
        part = todo.pop()
        if part is not None:
            yield part
            todo += [value for value in vars(part).values() if isinstance(value, (Policy, Codec))]
