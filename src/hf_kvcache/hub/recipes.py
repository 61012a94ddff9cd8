"""What a repository needs of the library, by what its cache is made of."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from hf_kvcache.cache import KVCache
from hf_kvcache.codecs.base import Chain, Codec
from hf_kvcache.hub.flatten import Recipe, flat
from hf_kvcache.policies.base import Policy
from hf_kvcache.policies.learned import Learned

_P = "hf_kvcache."
_CACHE, _LAYER = f"{_P}cache:KVCache.", f"{_P}layer:KVLayer."

_ADAPTERS = {"basis": "basis_children", "heads": "heads_children", "retrofit": "retrofit_children"}

# a second, faster kernel of the same rows, as long as the first; backends by name; the mask of an attention
# implementation that only the library registers; training on GPUs; checks of what our own code passes to ops
_LEFT_OUT = (
    "kernels.sparse_attention:gluon_kernel",
    "kernels:forced_backend",
    "attention.mask:KVMask",
    "attention.flex:serves",
    "kernels.dense_attention:check_operands",
    "kernels.quant_attention:_check_packed",
    "kernels.sparse_attention:_check_rows",
)

MODEL_ROOTS = (
    f"{_P}hub.citizen:CacheModel.from_pretrained._prepare_cache_for_generation._keep_in_fp32_modules_strict",
    f"{_P}hub.citizen:with_cache",
)
ROOTS = (
    f"{_P}hub.spec:cache_of",
    f"{_CACHE}nbytes.nbytes_dense.compression_ratio",
    # transformers' cache calls them on its layers
    f"{_LAYER}crop.batch_repeat_interleave.reorder_cache.offload.prefetch",
)
# saving caches, models in pieces: what the library is for
DROPPED = (f"{_P}codecs.base:Codec.__rshift__",) + tuple(
    f"{_CACHE}{name}" for name in ("save", "load", "check_model", "expect", "fingerprint")
)


def recipe_of(cache: KVCache, adapter: str | None = None, is_of_model: bool = True) -> Recipe:
    """What a repository needs that is to make caches like this one.

    Args:
        cache: empty.
        adapter: what the model carries for it, a key of `children.KINDS`, or None.
        is_of_model: whether it is the repository of a model, whose classes take the cache.
    """
    parts, facts, absent = list(_parts(cache)), {"_expected": None, "offloading": False}, list(_LEFT_OUT)
    roots = [*(MODEL_ROOTS if is_of_model else ()), *ROOTS, *(_path(type(part)) for part in parts)]
    absent += [f"hub.children:{function}" for kind, function in _ADAPTERS.items() if kind != adapter]
    absent += ["hub.children:add_children"] if adapter is None else []
    absent += _without_policy(facts) if cache.policy is None else []
    if not isinstance(cache.policy, Learned):
        facts["decides"] = False
        absent += ["policies.learned:Learned", "slots:SlotLayer", "adapters.modules:attached_retrofit"]
        absent += ["cache:KVCache.layer_for"]
    if cache.policy is None or not cache.policy.is_ragged:
        facts["is_ragged"] = False
        absent.append("stores.ragged:RaggedStore")
    if not cache.compact:
        facts["compact"] = False
    absent += _without_codecs(cache, parts, facts)
    return Recipe(tuple(roots), facts, tuple(f"{_P}{path}" for path in absent), DROPPED)


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


def _without_policy(facts: dict) -> list[str]:
    facts |= dict(
        policy=None,
        _policy=None,
        evicted_at=None,
        _queries=None,
        _is_due=False,
        tracked={},
        shares_rows=False,
        n_queries=0,
    )
    return [
        "policies.base:Policy",
        "policies.base:policy_from_spec",
        "layer:KVLayer.note_padding",
        "layer:KVLayer._asks_to_evict",
        "cache:KVCache._check_policy",
    ]


def _without_codecs(cache: KVCache, parts: list, facts: dict) -> list[str]:
    """What codecs of these kinds never ask for."""
    codecs, absent = [part for part in parts if isinstance(part, Codec)], []
    needs = frozenset().union(*(codec.needs for codec in codecs))
    formats = {codec.format for codec in codecs}
    if not any(isinstance(codec, Chain) for codec in codecs):
        absent.append("codecs.base:Chain")
    if all(codec.share_layers == 1 for codec in codecs):
        facts["share_layers"] = 1
        absent += ["stores.shared:SharedStore", "cache:KVCache._check_sharing"]
    if "model" not in needs:
        facts |= dict(needs_model=False, rope=None, is_unfitted=False, is_owned=False)
        absent += ["stores.uniform:UniformStore.fit"]
    if "queries" not in needs:
        facts["needs_queries"] = False
    if not needs & {"positions", "model"}:
        facts |= dict(has_rope=False, needs_positions=False)
        absent.append("layer:KVLayer.note_positions")
    if facts.get("n_queries") == 0 and "queries" not in needs:
        absent.append("stores.uniform:UniformStore.note_queries")
    if not any(codec.projects for codec in codecs):
        facts["projects"] = False
        absent.append("codecs.base:Codec.query_offset")
    if cache.exact_prefill:
        facts["exact_prefill"] = True
        absent.append("layer:KVLayer.project_new")
    for op, kinds in {"integers": ("int",), "lowrank": ("lowrank",), "sparse": ("sparse",)}.items():
        if not any(fmt.startswith(kinds) for fmt in formats):
            absent.append(f"attention.fused:attend_{op}")
    return absent
