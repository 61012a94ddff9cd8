"""What a repository needs of the library, by what its cache is made of."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from hf_kvcache.cache import KVCache
from hf_kvcache.codecs.base import Chain, Codec
from hf_kvcache.codecs.quantize import Quantize
from hf_kvcache.dmc.policies import TrainedEviction
from hf_kvcache.hub.flatten import Recipe, flat
from hf_kvcache.policies.base import Policy

_P = "hf_kvcache."
_CACHE, _LAYER = f"{_P}cache:KVCache.", f"{_P}layer:KVLayer."

# what the model carries, and what hangs it there
_ADAPTERS = {"basis": "basis_children", "heads": "heads_children", "retrofit": "retrofit_children"}

# a second, faster kernel of the same rows, as long as the first; backends by name; the mask of an attention
# implementation that only the library registers; training on GPUs
_LEFT_OUT = (
    "kernels.sparse_attention:gluon_kernel",
    "kernels:forced_backend",
    "attention.mask:KVMask",
    "dmc.flex:can_attend",
    # only a cache that was read from a file expects a certain model
    "cache:KVCache.check_model",
)

MODEL_ROOTS = (
    f"{_P}hub.citizen:CacheModel",
    f"{_P}hub.citizen:CacheModel.from_pretrained.is_custom_code._prepare_cache_for_generation",
    f"{_P}hub.citizen:with_cache",
    f"{_P}hub.citizen:either_name",
)
GENERATE_ROOTS = tuple(f"{_P}compat:{name}" for name in ("cache_argument", "given_cache", "named_cache"))
ROOTS = (
    f"{_P}hub.spec:cache_of",
    f"{_CACHE}nbytes.nbytes_dense.compression_ratio",
    # transformers' cache calls them on its layers
    f"{_LAYER}crop.batch_repeat_interleave.reorder_cache.offload.prefetch",
)
# saving caches and joining codecs by hand: what the library is for
DROPPED = (f"{_P}codecs.base:Codec.__rshift__", f"{_P}codecs.dense:Dense.__rshift__") + tuple(
    f"{_CACHE}{name}" for name in ("save", "load", "__reduce__", "__deepcopy__", "check_model", "expect", "fingerprint")
)


def recipe_of(cache: KVCache, adapter: dict | None = None, config=None) -> Recipe:
    """What a repository needs that is to make caches like this one.

    Args:
        cache: empty.
        adapter: what the model carries for it, as its config says it (see `children.add_children`), or None.
        config: of the model, whose classes take the cache; None for a repository that is for any model.
    """
    parts, absent = list(_parts(cache)), list(_LEFT_OUT)
    roots = [*(GENERATE_ROOTS if config is None else MODEL_ROOTS), *ROOTS, *(_path(type(part)) for part in parts)]
    kind = None if adapter is None else adapter["kind"]
    absent += [f"hub.children:{function}" for name, function in _ADAPTERS.items() if name != kind]
    absent += ["hub.children:add_children"] if adapter is None else []
    absent += [*_of_policy(cache), *_of_codecs(cache, parts)]
    return Recipe(tuple(roots), absent=tuple(f"{_P}{path}" for path in absent), dropped=DROPPED)


def classes_in(cache: KVCache) -> list[tuple[str, str]]:
    """Codecs and policies of a cache as a flat module and a name, sorted."""
    kinds = {type(part) for part in _parts(cache)}
    return sorted((flat(inspect.getmodule(kind).__name__), kind.__name__) for kind in kinds)


def _parts(cache: KVCache) -> Iterator[Policy | Codec]:
    """Codecs and policies, those within others included."""
    todo = [cache.policy, *(cache.codec or ()), *(cache.edge_codec or ())]
    while todo:
        part = todo.pop()
        if part is not None:
            yield part
            todo += [value for value in vars(part).values() if isinstance(value, (Policy, Codec))]


def _path(cls: type) -> str:
    return f"{inspect.getmodule(cls).__name__}:{cls.__name__}"


def _of_policy(cache: KVCache) -> Iterator[str]:
    """Classes that a cache with this policy, or without one, has no instances of."""
    if not isinstance(cache.policy, TrainedEviction):
        yield from ("dmc.policies:TrainedEviction", "dmc.layer:TrainedLayer", "adapters.modules:attached_retrofit")
        if cache.policy is None or not cache.policy.is_ragged:
            yield "stores.ragged:RaggedStore"


def _of_codecs(cache: KVCache, parts: list) -> Iterator[str]:
    """Classes that a cache with these codecs has no instances of, and ops for formats that it does not hold."""
    codecs = [part for part in parts if isinstance(part, Codec)]
    formats = {codec.format for pair in (cache.codec, cache.edge_codec) for codec in pair or ()}
    if not any(isinstance(codec, Chain) for codec in codecs):
        yield "codecs.base:Chain"
    if not any(isinstance(codec, Quantize) for codec in codecs):
        yield "codecs.quantize:Quantize"
    if all(codec.share_layers == 1 for codec in codecs):
        yield "stores.shared:SharedStore"
    for op, kinds in {"integers": ("int",), "lowrank": ("lowrank",), "sparse_rows": ("sparse",)}.items():
        if not any(fmt.startswith(kinds) for fmt in formats):
            yield f"attention.fused:attend_{op}"
