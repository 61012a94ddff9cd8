"""What exists: the methods by name, and the op that reads each storage format."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Method:
    """A named cache: feeds the command line, the README table and the tests.

    Attributes:
        name: what the command line calls it.
        factory: where its cache or policy class is, "module:name".
        axis: "tokens", "channels", "bits", "layers", or "none".
        summary: one line.
        paper: source.
        arguments: the defaults shown beside it.
    """

    name: str
    factory: str
    axis: str
    summary: str
    paper: str = ""
    arguments: str = ""


METHODS = (
    Method("dense", "hf_kvcache.presets:DenseCache", "none", "Lossless: preallocated, query heads folded"),
    Method(
        "quant",
        "hf_kvcache.presets:QuantCache",
        "bits",
        "8, 4, 3 or 2 bits: keys per channel, values per token, recent window dense",
        "KIVI, Liu et al. 2024",
        "bits=4, window=64, rotate=False, edge_layers=0",
    ),
    Method(
        "sparse",
        "hf_kvcache.presets:SparseCache",
        "channels",
        "The largest channels of every token, optionally quantised; recent window dense",
        "Mustafar, Joo et al. 2025",
        "sparsity=0.7, bits=None, layout='bitmap', window=32, n_sink=4",
    ),
    Method(
        "lowrank",
        "hf_kvcache.presets:LowRankCache",
        "channels",
        "Low-rank latents, keys rebuilt and rotated inside attention, optionally quantised; recent window dense",
        "Palu, Chang et al. 2025",
        "rank=None, bits=None, rope=None, adapter=None, window=64, n_sink=4",
    ),
    Method(
        "streaming",
        "hf_kvcache.policies.streaming:Streaming",
        "tokens",
        "Attention sinks and the recent window",
        "StreamingLLM, Xiao et al. 2023",
        "budget or ratio, n_sink=4",
    ),
    Method(
        "keydiff",
        "hf_kvcache.policies.keydiff:KeyDiff",
        "tokens",
        "Keys that differ most from the mean key",
        "KeyDiff, Park et al. 2025",
        "budget or ratio, n_sink=4, n_recent=32",
    ),
)

# (format of keys, format of values) -> the function that attends over a store of that kind
FUSED = {
    ("int/channel", "int"): "hf_kvcache.attention.fused:integers",
    ("int", "int"): "hf_kvcache.attention.fused:integers",
}
# every other pair of row-granular formats: a row is a list of values, quantised or not, and the places they belong to
_ROWS = ("sparse", "sparse>int", "dense", "int")
FUSED |= {
    (keys, values): "hf_kvcache.attention.fused:sparse"
    for keys in _ROWS
    for values in _ROWS
    if (keys, values) not in (("dense", "dense"), ("int", "int"))
}
# latents on one side at least; a side without is of full rank
_LATENTS = ("lowrank", "lowrank>int", "dense", "int")
FUSED |= {
    (keys, values): "hf_kvcache.attention.fused:lowrank"
    for keys in (*_LATENTS, "lowrank/rope", "lowrank/rope>int")
    for values in _LATENTS
    if "lowrank" in keys + values
}


def method(name: str) -> Method:
    """The method called `name`; raises ValueError with the names there are."""
    for candidate in METHODS:
        if candidate.name == name:
            return candidate
    raise ValueError(f"no method is called {name!r}; there are {', '.join(m.name for m in METHODS)}")


def load(where: str):
    """The object at "module:name"."""
    module, name = where.split(":")
    return getattr(import_module(module), name)
