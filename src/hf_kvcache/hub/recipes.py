"""What a repository needs of the library, by what its cache is made of."""

from __future__ import annotations

from collections.abc import Iterator

from hf_kvcache.attention.fused import op_of
from hf_kvcache.cache import KVCache
from hf_kvcache.codecs.base import Codec
from hf_kvcache.hub.flatten import PACKAGE, flat
from hf_kvcache.policies.base import Policy


def roots_of(cache: KVCache, adapter: dict | None = None, *, is_model: bool = True) -> set[str]:
    """Modules that a repository must have that is to make caches like this one.

    Args:
        cache: empty.
        adapter: what the model carries for it, as its config says it (see `adapter_modules`), or None.
        is_model: whether it has a model, whose classes take the cache; else it is for any model.
    """
    roots = {f"{PACKAGE}.hub.spec", f"{PACKAGE}.hub.modeling_mixin" if is_model else f"{PACKAGE}.compat"}
    for part in _parts(cache):
        store = part.store_type()
        roots |= {type(part).__module__} | (set() if store is None else {store.__module__})
    if adapter is not None:
        roots.add(f"{PACKAGE}.hub.{adapter['kind']}_module")
    for pair in (cache.codec, cache.edge_codec):
        op = None if pair is None else op_of(*(codec.format for codec in pair))
        roots |= set() if op is None else {op.__module__}
    if cache.policy is not None and cache.policy.is_ragged:
        roots.add(f"{PACKAGE}.attention.pages")
    # what is asked of the model: its RoPE, and bases that hang on it
    asking = [part for part in _parts(cache) if "model" in part.needs]
    roots |= {f"{PACKAGE}.rope_of_model"} if asking or cache.rerotate_keys else set()
    roots |= {f"{PACKAGE}.adapters.modules"} if any(isinstance(part, Codec) for part in asking) else set()
    return roots


def classes_in(cache: KVCache) -> list[tuple[str, str]]:
    """Codecs and policies of a cache as a flat module and a name, sorted."""
    kinds = {type(part) for part in _parts(cache)}
    return sorted((flat(kind.__module__), kind.__name__) for kind in kinds)


def _parts(cache: KVCache) -> Iterator[Policy | Codec]:
    """Codecs and policies, those within others included."""
    todo = [cache.policy, *(cache.codec or ()), *(cache.edge_codec or ())]
    while todo:
        part = todo.pop()
        if part is not None:
            yield part
            todo += [value for value in vars(part).values() if isinstance(value, (Policy, Codec))]
