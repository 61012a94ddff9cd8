"""The files of retaining heads: `peft_type` "RETAINING_HEAD", two matrices per layer.

Tensors are called `<attention>.kv_retain.kv_retain_<fc1 | fc2>`.
"""

from __future__ import annotations

from hf_kvcache.adapters.kinds import Kind, are_layers, is_a, is_count, is_index, or_none
from hf_kvcache.adapters.modules import RETAIN_CHILD, Attention
from hf_kvcache.adapters.projections import FEATURE_POINTS, sources
from hf_kvcache.adapters.scoring import activation_of

PARTS = ("fc1", "fc2")
TARGETS = ("answer_max", "answer_weight", "causal", "reconstruction")
DEFAULTS = ("budget", "chunk", "stabilizers", "local")

_MAX_D_R = 1 << 13  # eight times the paper's
SETTINGS = ("activation", "feature_point", "target", "query_aware", "n_query")


def feature_dim(attention: Attention) -> int:
    """`F = (Hq + 2 * Hkv) * D`."""
    return (attention.n_heads + 2 * attention.n_kv_heads) * attention.head_dim


class RetainingKind(Kind):
    """Retaining heads, which score the tokens that a model writes into its cache."""

    peft_type = "RETAINING_HEAD"
    title = "an adapter of retaining heads"
    child = RETAIN_CHILD
    parts = PARTS
    config_name = "RetainingHeadConfig"
    taken = "has retaining heads"
    card = (
        "Retaining heads: a cache keeps the tokens that they score highest (Locret, arXiv 2410.01805)",
        "locret",
        "cache = kv.LocretCache(budget=4096)  # finds the heads",
    )
    fields = {
        "feature_dim": is_count,
        "num_kv_heads": is_count,
        # transformers makes the tensors before it reads the file
        "d_r": lambda value: is_count(value) and value <= _MAX_D_R,
        "layers": are_layers,
        "activation": is_a(str),
        "feature_point": lambda value: value in FEATURE_POINTS,
        "target": lambda value: value in TARGETS,
        "query_aware": is_a(bool),
        "n_query": or_none(is_count),
        **{f"default_{name}": or_none(is_index) for name in DEFAULTS},
    }

    def check_further(self, config, where):
        activation_of(config["activation"])

    def shapes(self, config):
        own = {"fc1": (config["d_r"], config["feature_dim"]), "fc2": (config["num_kv_heads"], config["d_r"])}
        return {(i, part): own[part] for i in config["layers"] for part in PARTS}

    def settings(self, config):
        defaults = {name: config[f"default_{name}"] for name in DEFAULTS if config[f"default_{name}"] is not None}
        return {name: config[name] for name in SETTINGS} | {"defaults": defaults}

    def sizes(self, config, attention):
        yield "KV heads", config["num_kv_heads"], attention.n_kv_heads
        yield "features", config["feature_dim"], feature_dim(attention)

    def misfits(self, config, model, found):
        for i in config["layers"]:
            if i in found:
                # raises for what is missing
                sources(found[i].module, config["feature_point"])
        return []


RETAINING = RetainingKind()
