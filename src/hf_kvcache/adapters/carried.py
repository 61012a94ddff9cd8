"""What a model carries for a cache, as an exported repository has it: a description, and weights."""

from __future__ import annotations

import torch

from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.modules import (
    CHILD,
    RETAIN_CHILD,
    RETROFIT_CHILD,
    attached_basis,
    attached_heads,
    attached_retrofit,
    full_attentions,
)
from hf_kvcache.cache import KVCache
from hf_kvcache.codecs.lowrank import LowRank
from hf_kvcache.dmc.policies import TrainedEviction
from hf_kvcache.policies.locret import Locret
from hf_kvcache.rope_of_model import rope_of


def carried(model, cache: KVCache) -> tuple[dict | None, dict[str, torch.Tensor]]:
    """What a repository's config says of what the model carries for this cache, and the tensors by names of weights.

    Returns:
        `kind` ("basis", "heads" or "retrofit"), and what that takes; None where the cache asks for nothing.

    Raises:
        AdapterError: the model lacks it, or would have to carry two things.
    """
    found = full_attentions(model)
    if isinstance(cache.policy, TrainedEviction):
        return _retrofit(found, cache.policy)
    firsts = {name: _firsts(getattr(cache, name)) for name in ("codec", "edge_codec")}
    lowrank = {side: codec for side, codec in zip("kv", firsts["codec"]) if isinstance(codec, LowRank)}
    if any(isinstance(c, LowRank) for options in cache.per_layer.values() for c in _firsts(options.get("codec"))):
        raise AdapterError("per_layer has latents, whose bases an exported model does not carry")
    if any(isinstance(codec, LowRank) for codec in firsts["edge_codec"]):
        raise AdapterError("edge_codec has latents, whose bases an exported model does not carry")
    if isinstance(cache.policy, Locret):
        if lowrank:
            raise AdapterError(
                "Locret over latents asks for retaining heads and bases; a repository carries one of them"
            )
        return _heads(found)
    return _basis(found, lowrank) if lowrank else (None, {})


def _firsts(pair) -> list:
    """The codecs of keys and values, of chains the first."""
    return [codec.parts[0] for codec in pair or ()]


def _basis(found, codecs: dict[str, LowRank]):
    tensors, shapes, ropes, rotary = {}, {}, set(), set()
    for i, attention in found.items():
        if "k" in codecs and codecs["k"].rope != "post":
            rope = rope_of(attention.module, attention.head_dim)
            rotary.add(0 if rope is None else 2 * rope.inv_freq.shape[0])
        for side, codec in codecs.items():
            bases = codec.bases
            of = attached_basis(attention.module, side) if bases is None else (bases.of(i, side), bases.rope)
            if of is None or of[0] is None:
                raise AdapterError(
                    f"layer {i} has no basis for its {'keys' if side == 'k' else 'values'}: a repository ships "
                    "calibrated ones (`hf-kvcache calibrate lowrank`), attached to the model or given to the cache"
                )
            basis, rope = of
            ropes.add(rope)
            for part, t in basis.tensors.items():
                shapes.setdefault(str(i), {})[f"{side}_{part}"] = list(t.shape)
                tensors[f"{attention.name}.{CHILD}.{side}_{part}"] = t.detach().float().cpu().contiguous()
    if len(ropes) > 1:
        raise AdapterError(
            "some bases are of rows before RoPE and some of rows after it; a repository carries one kind"
        )
    rope = ropes.pop()
    # channels that RoPE turns, where all layers are alike
    turned = rotary.pop() if rope == "pre" and len(rotary) == 1 else None
    return {"kind": "basis", "rope": rope, "rotary": turned, "shapes": shapes}, tensors


def _heads(found):
    tensors, shapes, settings = {}, {}, None
    for i, attention in found.items():
        heads = attached_heads(attention.module)
        if heads is None:
            raise AdapterError(
                f"layer {i} has no retaining heads, which Locret goes by: attach them "
                "(hf_kvcache.adapters.attach(model, folder)) before exporting"
            )
        settings = heads.settings
        for part, t in zip(("fc1", "fc2"), heads.weights()):
            shapes.setdefault(str(i), {})[part] = list(t.shape)
            tensors[f"{attention.name}.{RETAIN_CHILD}.{part}"] = t.detach().float().cpu().contiguous()
    knobs = {name: settings[name] for name in ("activation", "feature_point")}
    return {"kind": "heads", "shapes": shapes} | knobs, tensors


def _retrofit(found, policy: TrainedEviction):
    tensors, settings = {}, set()
    for i, attention in found.items():
        child = attached_retrofit(attention.module)
        if child is None or child.settings.method != policy.method:
            raise AdapterError(f"layer {i} is not retrofitted for {policy.method.upper()}; `hf-kvcache train dmc` does")
        settings.add(child.settings)
        for part, t in zip(("decision", "importance"), child.rows()):
            if t is not None:
                tensors[f"{attention.name}.{RETROFIT_CHILD}.{part}"] = t.detach().cpu().contiguous()
    if len(settings) > 1:
        raise AdapterError(f"the layers of the model have different settings: {settings}")
    return {"kind": "retrofit", "settings": settings.pop().to_dict()}, tensors
