"""What a repository needs of the library, by what its cache is made of."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from hf_kvcache.attention.fused import op_of
from hf_kvcache.cache import KVCache
from hf_kvcache.codecs.base import Chain, Codec
from hf_kvcache.codecs.lowrank import LowRank
from hf_kvcache.codecs.quantize import Quantize
from hf_kvcache.compat import stock_layers
from hf_kvcache.dmc.settings import Settings
from hf_kvcache.hub.flatten import Recipe, flat
from hf_kvcache.hub.values import SOMETHING
from hf_kvcache.policies.base import Policy
from hf_kvcache.policies.learned import Learned

_P = "hf_kvcache."
_CACHE, _LAYER = f"{_P}cache:KVCache.", f"{_P}layer:KVLayer."

# huge pages serve the kernels for CPUs, which stay behind
_FACTS = {"_expected": None, "offloading": False, "_madvise": None}
_NO_POLICY = dict(
    policy=None,
    _policy=None,
    evicted_at=None,
    _queries=None,
    _is_due=False,
    tracked={},
    shares_rows=False,
    n_queries=0,
)
_ADAPTERS = {"basis": "basis_children", "heads": "heads_children", "retrofit": "retrofit_children"}

# a second, faster kernel of the same rows, as long as the first; backends by name; the mask of an attention
# implementation that only the library registers; training on GPUs; checks of what our own code passes to ops
_LEFT_OUT = (
    "kernels.sparse_attention:gluon_kernel",
    "kernels:forced_backend",
    "attention.mask:KVMask",
    "attention.flex:serves",
    # the arguments of a cache were fit for each other when it was exported
    "cache:KVCache._check_use",
    "cache:KVCache._check_policy",
    "cache:KVCache._check_pair",
    "kernels.dense_attention:check_operands",
    "kernels.lowrank_attention:check_latents",
    "kernels.ragged_attention:check_pages",
    "kernels.merge_step:check_members",
    "kernels.slot_step:check_slots",
    "kernels.slot_step:check_places",
    "kernels.quant_attention:_check_packed",
    "kernels.quant_pack:check_packing",
    "kernels.sparse_attention:_check_rows",
)

MODEL_ROOTS = (
    f"{_P}hub.citizen:CacheModel",
    f"{_P}hub.citizen:CacheModel.from_pretrained._prepare_cache_for_generation",
    f"{_P}hub.citizen:with_cache",
)
ROOTS = (
    f"{_P}hub.spec:cache_of",
    f"{_CACHE}nbytes.nbytes_dense.compression_ratio",
    # transformers' cache calls them on its layers
    f"{_LAYER}crop.batch_repeat_interleave.reorder_cache.offload.prefetch",
)
# saving caches, models in pieces: what the library is for
DROPPED = (f"{_P}codecs.base:Codec.__rshift__", f"{_P}codecs.dense:Dense.__rshift__") + tuple(
    f"{_CACHE}{name}" for name in ("save", "load", "check_model", "expect", "fingerprint")
)
# what only policies ask for
_FOR_POLICIES = (
    *(f"{_P}view:KVView.{name}" for name in ("memory", "positions", "queries", "scaling", "softcap")),
    f"{_P}stores.uniform:UniformStore.positions",
    f"{_P}shards:Shard.mean",
)
# a store in pages only has no dense window that rows could come from or go to
_NOT_LEARNED = (
    *(f"{_P}stores.uniform:UniformStore.{name}" for name in ("append", "crop", "newest_queries")),
    *(f"{_P}stores.ragged:RaggedStore.{name}" for name in ("keep", "_to_pages", "_unpack")),
    f"{_P}stores.paged:PagedBuffer.n_rows",
    *(f"{_P}stores.buffer:RowBuffer.{name}" for name in ("__getitem__", "append", "gather", "own", "remove")),
    *(f"{_P}view:KVView.{name}" for name in ("memory", "positions", "queries", "scaling", "softcap")),
    *(f"{_P}view:KVView.{name}" for name in ("n_kept", "tokens_seen", "dtype", "device")),
    *(f"{_P}adapters.modules:Attention.{name}" for name in ("layer_idx", "n_heads")),
    f"{_P}dmc.hooks:Hooks.remove",
    f"{_P}dmc.retrofitting:Retrofit.extra_repr",
)


def recipe_of(cache: KVCache, adapter: dict | None = None, config=None) -> Recipe:
    """What a repository needs that is to make caches like this one.

    Args:
        cache: empty.
        adapter: what the model carries for it, as its config says it (see `children.add_children`), or None.
        config: of the model, whose classes take the cache; None for a repository that is for any model.
    """
    parts, facts, absent = list(_parts(cache)), dict(_FACTS), list(_LEFT_OUT)
    roots = [*(() if config is None else MODEL_ROOTS), *ROOTS, *(_path(type(part)) for part in parts)]
    kind = None if adapter is None else adapter["kind"]
    absent += [f"hub.children:{function}" for name, function in _ADAPTERS.items() if name != kind]
    absent += ["hub.children:add_children"] if adapter is None else []
    dropped = [*DROPPED, *(_FOR_POLICIES if cache.policy is None else ())]
    if config is not None:
        dropped += _of_model(config, facts, absent)
    if kind == "retrofit":
        dropped += _of_retrofit(adapter["settings"], facts)
        # rows without a codec are placed and written at once where Triton serves
        dropped += [f"{_P}kernels.slot_step.triton_kernel:slot_step"] if cache.codec is None else []
    if not cache.compact and not any("model" in part.needs for part in parts):
        dropped.append(f"{_LAYER}bind")
        facts |= dict(needs_model=False, rope=None)
    _of_policy(cache, facts, absent)
    _of_codecs(cache, parts, facts, absent)
    if kind == "basis":
        _of_bases(adapter, [part for part in parts if isinstance(part, LowRank)], facts, absent)
    # keys before RoPE are rebuilt, so queries stay as they are
    same = frozenset({"project_query"} if kind == "basis" and adapter["rotary"] else ())
    missing = tuple(f"{_P}{path}" for path in absent)
    return Recipe(tuple(roots), facts, fixed=_fixed(cache), same=same, absent=missing, dropped=tuple(dropped))


def _fixed(cache: KVCache) -> dict:
    """Arguments of caches that are left at what they are by default, so that nothing passes them on."""
    plain = KVCache()
    names = ["offloading", "codec", "edge_layers", "edge_codec", "min_length", "max_length", "exact_prefill", "compact"]
    # pages only: there is no place for sinks of the cache
    names += ["n_sink"] if isinstance(cache.policy, Learned) else []
    return {name: value for name in names if getattr(cache, name) == (value := getattr(plain, name))}


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


def _of_model(config, facts: dict, absent: list[str]) -> list[str]:
    """What is known of a model; returns what its cache does without."""
    values = config.get_text_config(decoder=True).to_dict()
    if not any("softcap" in name and value for name, value in values.items()):
        facts |= dict(softcap=None, CAP=False)
    if any(stock_layers(config)):
        return []
    # all layers are ours
    absent += ["cache:KVCache._stock_layer", "compat:drop_rows", "compat:stock_nbytes"]
    return [f"{_CACHE}update_conv_state"]


def _of_retrofit(values: dict, facts: dict) -> tuple[str, ...]:
    """The model decides, always in the same way, and is not trained any more; returns what its cache does without."""
    settings = Settings.from_dict(values)
    known = ("merges", "ablates", "clears_queries", "decision", "zero_after_rope", "per")
    facts |= {f".{name}": getattr(settings, name) for name in known}
    facts |= {"window": settings.window, ".method": settings.method}
    facts |= {"trains": False, "is_relaxed": False, ".noise": None, ".compresses": True, ".fade": 0.0, "noise": None}
    return _NOT_LEARNED


def _of_policy(cache: KVCache, facts: dict, absent: list[str]) -> None:
    """Which tokens stay: all of them, those that the model names, or those of a policy."""
    if cache.policy is None:
        facts |= _NO_POLICY
        absent += ["policies.base:Policy", "policies.base:policy_from_spec", "layer:KVLayer.note_padding"]
        absent += ["layer:KVLayer._asks_to_evict"]
    else:
        facts |= dict(policy=SOMETHING, _policy=SOMETHING)
        kinds = [part for part in _parts(cache) if isinstance(part, Policy)]
        for name in ("observes", "folds", "waits", "decides", "takes_budget"):
            if len(values := {getattr(kind, name) for kind in kinds}) == 1:
                facts[f".{name}"] = values.pop()
    if not isinstance(cache.policy, Learned):
        facts["decides"] = False
        absent += ["policies.learned:Learned", "slots:SlotLayer", "adapters.modules:attached_retrofit"]
        absent += ["cache:KVCache.layer_for"]
    if cache.policy is None or not cache.policy.is_ragged:
        facts["is_ragged"] = False
        absent.append("stores.ragged:RaggedStore")
    if not cache.compact:
        facts["compact"] = False


def _of_codecs(cache: KVCache, parts: list, facts: dict, absent: list[str]) -> None:
    """What codecs of these kinds never ask for."""
    codecs = [part for part in parts if isinstance(part, Codec)]
    needs = frozenset().union(*(codec.needs for codec in codecs))
    pairs = [pair for pair in (cache.codec, cache.edge_codec) if pair is not None]
    formats = {codec.format for pair in pairs for codec in pair}
    if not pairs:
        absent.append("hub.spec:make_codecs")
    if all(op_of(keys.format, values.format) is not None for keys, values in pairs):
        facts["attend_op"] = SOMETHING
    if cache.codec is not None and not cache.edge_layers:
        # every layer has one, for both sides
        facts |= {"keys": SOMETHING, "codec": SOMETHING}
        if all("positions" in keys.needs for keys, _ in pairs):
            facts |= dict(needs_positions=True, has_rope=True)
    if not any(isinstance(codec, Chain) for codec in codecs):
        absent.append("codecs.base:Chain")
    if all(codec.share_layers == 1 for codec in codecs):
        facts["share_layers"] = 1
        absent += ["stores.shared:SharedStore", "cache:KVCache._check_sharing"]
    if "model" not in needs:
        facts |= dict(is_unfitted=False, is_owned=False)
        absent += ["stores.uniform:UniformStore.fit"]
    if "queries" in needs:
        facts.pop("n_queries", None)
    else:
        facts["needs_queries"] = False
    if not needs & {"positions", "model"}:
        facts |= dict(has_rope=False, needs_positions=False)
        absent.append("layer:KVLayer.note_positions")
    if facts.get("n_queries") == 0 and "queries" not in needs:
        absent.append("stores.uniform:UniformStore.note_queries")
    if not any(codec.projects for codec in codecs):
        facts["projects"] = False
        absent += ["codecs.base:Codec.query_offset", "codecs.base:Chain.query_offset"]
    elif all(any(codec.projects for codec in pair) for pair in pairs):
        facts["projects"] = True
    if not any(isinstance(codec, Quantize) for codec in codecs):
        absent.append("codecs.quantize:Quantize")
    if cache.exact_prefill:
        facts["exact_prefill"] = True
        absent.append("layer:KVLayer.project_new")
    for op, kinds in {"integers": ("int",), "lowrank": ("lowrank",), "sparse_rows": ("sparse",)}.items():
        if not any(fmt.startswith(kinds) for fmt in formats):
            absent.append(f"attention.fused:attend_{op}")
    if not any(getattr(codec, "rotate", False) for codec in codecs):
        facts[".rotate"] = False
    _of_kernels(pairs, codecs, facts)


def _of_kernels(pairs: list, codecs: list[Codec], facts: dict) -> None:
    """What kernels are compiled for."""
    formats = {codec.format for pair in pairs for codec in pair}
    if not formats:
        # rows of pages are as the model made them
        facts |= {".places": None, ".format": "dense", "ORDERED": False, "is_plain": True, "order": None}
        facts |= dict.fromkeys(("FORM", "K_FORM", "V_FORM"), "plain")
    bits = {codec.bits for codec in codecs if isinstance(codec, Quantize)}
    is_integer = {"int" in fmt for fmt in formats}
    if not bits:
        facts |= {".bits": None, "BITS": 0, "K_BITS": 0, "V_BITS": 0, "GROUPS": 0, "K_GROUPS": 0, "V_GROUPS": 0}
        facts["bits"] = 0
    elif len(bits) == 1 and is_integer == {True}:
        facts |= dict.fromkeys((".bits", "BITS", "K_BITS", "V_BITS"), bits.pop())
    axes = {codec.axis for codec in codecs if hasattr(codec, "axis")}
    if len(axes) == 1:
        facts |= dict.fromkeys((".axis", "axis"), axis := axes.pop())
        facts |= dict.fromkeys(("BY_CHANNEL", "by_channel"), axis == "channel")
    key_formats = {pair[0].format for pair in pairs}
    if formats <= {"int", "int/channel"} and len(key_formats) == 1:
        is_by_channel = key_formats == {"int/channel"}
        facts |= {"key_axis": "channel" if is_by_channel else "token", "K_GROUPS": 0 if is_by_channel else SOMETHING}


def _of_bases(adapter: dict, codecs: list, facts: dict, absent: list[str]) -> None:
    """Latents in bases that the model brings, so that none is ever fitted."""
    facts |= dict(is_unfitted=False, is_owned=False, bases=None)
    absent.append("stores.uniform:UniformStore.fit")
    absent += [f"codecs.{path}.fitted" for path in ("base:Codec", "base:Chain", "lowrank:LowRank")]
    if not any(codec.mix for codec in codecs):
        facts["is_mixed"] = False
    if adapter["rope"] == "post":
        # queries go to the latents, so that no row is rebuilt
        facts |= dict(expansion=None, tables=None, rotary=None, rotated=False, rotates=False, needs_positions=False)
        facts |= dict(REBUILD=False, MEAN=False, HALF=0, RF=0)
    if not adapter["rotary"]:
        return
    # keys are rebuilt and rotated, so values are summed by a kernel of their own
    facts |= dict(rotated=True, REBUILD=True, FUSED=False, expansion=SOMETHING, tables=SOMETHING, up=SOMETHING)
    facts |= {".tables": SOMETHING, "HALF": adapter["rotary"] // 2, "rotary": SOMETHING, "found": SOMETHING}
    facts["fused_values"] = None
    if {shapes["k_up"][-1] for shapes in adapter["shapes"].values()} == {adapter["rotary"]}:
        facts |= dict(RF=0, rest=0)
    absent += [f"codecs.{path}.query_offset" for path in ("base:Codec", "base:Chain", "lowrank:LowRank")]
    if len(means := {"k_mean" in shapes for shapes in adapter["shapes"].values()}) == 1:
        facts["MEAN"] = means.pop()
