"""A cache that travels: `pickle`, `torch.save` and `multiprocessing`."""

from __future__ import annotations

import copy

import torch

from hf_kvcache import persist, restoring
from hf_kvcache.codecs.fitted import refit
from hf_kvcache.layer import KVLayer
from hf_kvcache.manifest import read_entry


def reduced(cache) -> tuple:
    """What `pickle` asks of an object: how to make it again, and of what.

    Rows in use travel as copies, so that no process writes to the memory of another, and nothing of the model does:
    its fingerprint stands for it.

    Raises:
        ValueError: a forward pass is under way, the model that filled the cache is gone, or the cache offloads layers.
    """
    if cache.offloading:
        raise ValueError(
            "a cache with offloading=True has its layers in two places, which a pickle cannot: save() it to a folder, "
            "or make it without offloading"
        )
    layers = []
    # a layer that is in both lists is one layer
    memo: dict = {}
    for layer in cache.layers:
        if not isinstance(layer, KVLayer):
            layers.append(copy.deepcopy(layer, memo))
            continue
        entry, views = restoring.describe(layer)
        rows = {
            name: t.detach().clone(memory_format=torch.contiguous_format)
            for name, t in views.items()
            if not name.startswith("constants.")
        }
        held = (layer.store.keys, layer.store.values)
        held = tuple(None if codec is None else refit(codec, lambda part: part.alone()) for codec in held)
        layers.append((entry, held, layer._codecs, rows))
    options = {name: getattr(cache, name) for name in persist.OPTIONS}
    state = {
        "options": options | {name: getattr(cache, name) for name in ("policy", "codec", "edge_codec", "per_layer")},
        "attributes": persist.own_attributes(cache),
        "records_past": cache._records_past,
        "model": persist.model_of(cache),
        "hf_layers": copy.deepcopy(cache._hf_layers, memo),
        "n_states": dict(cache._n_states),
        "layers": layers,
        "groups": persist.groups_of(cache),
    }
    return rebuilt, (type(cache), state)


def rebuilt(kind: type, state: dict):
    """The cache that `reduced` took apart, which will look for its model."""
    cache = kind.__new__(kind)
    persist.construct(cache, **state["options"])
    vars(cache).update(state["attributes"])
    cache._records_past, cache._hf_layers = state["records_past"], state["hf_layers"]
    cache._n_states = state["n_states"]
    for i, item in enumerate(state["layers"]):
        if not isinstance(item, tuple):
            cache.layers.append(item)
            continue
        described, held, codecs, rows = item
        entry = read_entry(described, i)
        layer = restoring.empty(i, held, codecs, cache, entry)
        restoring.fill(layer, entry, rows)
        cache.layers.append(layer)
    restoring.join_groups(cache.layers, state["groups"])
    cache.expect(state["model"])
    return cache
