"""What exists: the methods by name."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Method:
    """A named cache: feeds the command line, the tables of README and docs, the cards and the tests.

    Attributes:
        name: what the command line calls it.
        factory: where its cache or policy class is, "module:name".
        axis: "tokens", "channels", "bits", "layers", or "none".
        summary: one line.
        paper: source.
        arguments: the defaults shown beside it.
        page: its page in docs/, without the ending.
        arxiv: number of the paper there, or "".
        compared: what `compare --all` runs of it, as typed; None for its defaults, at a quarter of the tokens if it
            evicts. Of the eviction family it runs those that the others are measured by (`benchmarks/run.py eviction`
            compares them all), and models of their own are not compared with others.
    """

    name: str
    factory: str
    axis: str
    summary: str
    paper: str = ""
    arguments: str = ""
    page: str = ""
    arxiv: str = ""
    compared: tuple[str, ...] | None = None

    @property
    def source(self) -> str:
        """Paper and arXiv number as running text."""
        return f"{self.paper}, arXiv {self.arxiv}" if self.arxiv else self.paper


METHODS = (
    Method(
        "dense",
        "hf_kvcache.presets:DenseCache",
        "none",
        "Lossless: preallocated, the query heads of a KV head read together",
        page="walk",
        compared=("dense",),
    ),
    Method(
        "quant",
        "hf_kvcache.presets:QuantCache",
        "bits",
        "8, 4, 3 or 2 bits: keys per channel, values per token, recent window dense",
        "KIVI, Liu et al. 2024",
        "bits=4, window=64, rotate=False, edge_layers=0",
        page="quantisation",
        arxiv="2402.02750",
        compared=(
            "quant:bits=8",
            "quant:bits=4",
            "quant:bits=4,rotate=true",
            "quant:bits=3",
            "quant:bits=2",
            "quant:bits=2,edge_layers=1",
        ),
    ),
    Method(
        "sparse",
        "hf_kvcache.presets:SparseCache",
        "channels",
        "The largest channels of every token, optionally quantised; recent window dense",
        "Mustafar, Joo et al. 2025",
        "sparsity=0.7, bits=None, layout='bitmap', window=32, n_sink=4",
        page="sparse",
        arxiv="2505.22913",
        compared=(
            "sparse:sparsity=0.5",
            "sparse:sparsity=0.7",
            "sparse:sparsity=balanced",
            "sparse:sparsity=0.5,bits=4",
            "sparse:sparsity=0.7,bits=4",
            "sparse:sparsity=0.5,rule=think",
        ),
    ),
    Method(
        "lowrank",
        "hf_kvcache.presets:LowRankCache",
        "channels",
        "Low-rank latents, keys rebuilt and rotated inside attention, optionally quantised; recent window dense",
        "Palu, Chang et al. 2025",
        "rank=None, bits=None, rope=None, adapter=None, window=64, n_sink=4",
        page="low-rank",
        arxiv="2407.21118",
        compared=(
            "lowrank:rank=0.5",
            "lowrank:rank=0.5,bits=4",
            "lowrank:rank=0.5,rope=post",
            "lowrank:rank=0.25",
        ),
    ),
    Method(
        "streaming",
        "hf_kvcache.policies.streaming:Streaming",
        "tokens",
        "Attention sinks and the recent window",
        "StreamingLLM, Xiao et al. 2023",
        "budget or ratio, n_sink=4",
        page="eviction",
        arxiv="2309.17453",
    ),
    Method(
        "h2o",
        "hf_kvcache.policies.h2o:H2O",
        "tokens",
        "Tokens that have got the most attention from all queries so far",
        "H2O, Zhang et al. 2023",
        "budget or ratio, recent_share=0.5",
        page="eviction",
        arxiv="2306.14048",
    ),
    Method(
        "tova",
        "hf_kvcache.policies.tova:TOVA",
        "tokens",
        "Tokens that the newest query attends to, the same for all heads",
        "TOVA, Oren et al. 2024",
        "budget or ratio",
        page="eviction",
        arxiv="2401.06104",
        compared=(),
    ),
    Method(
        "snapkv",
        "hf_kvcache.policies.snapkv:SnapKV",
        "tokens",
        "Tokens that the newest queries attend to, and their neighbours",
        "SnapKV, Li et al. 2024",
        "budget or ratio, n_queries=32, kernel=7",
        page="eviction",
        arxiv="2404.14469",
    ),
    Method(
        "pyramidkv",
        "hf_kvcache.policies.pyramidkv:PyramidKV",
        "tokens",
        "SnapKV with larger budgets for lower layers",
        "PyramidKV, Cai et al. 2024",
        "budget or ratio, beta=20",
        page="eviction",
        arxiv="2406.02069",
        compared=(),
    ),
    Method(
        "adakv",
        "hf_kvcache.policies.adakv:AdaKV",
        "tokens",
        "Any scorer's best tokens of a layer, whosever head they are: ragged",
        "Ada-KV, Feng et al. 2024",
        "budget or ratio, scorer='snapkv', floor=0.2",
        page="eviction",
        arxiv="2407.11550",
        compared=(
            "adakv:ratio=0.25",
            "adakv:ratio=0.5,scorer=expected_attention+quant:bits=8",
        ),
    ),
    Method(
        "chunkkv",
        "hf_kvcache.policies.chunkkv:ChunkKV",
        "tokens",
        "Any scorer's best chunks of neighbouring tokens",
        "ChunkKV, Liu et al. 2025",
        "budget or ratio, scorer='snapkv', chunk_size=10",
        page="eviction",
        arxiv="2502.00299",
        compared=(),
    ),
    Method(
        "keydiff",
        "hf_kvcache.policies.keydiff:KeyDiff",
        "tokens",
        "Keys that differ most from the mean key",
        "KeyDiff, Park et al. 2025",
        "budget or ratio, n_sink=4, n_recent=32",
        page="eviction",
        arxiv="2504.15364",
        compared=(
            "keydiff:ratio=0.25",
            "keydiff:ratio=0.5+quant:bits=8",
            "keydiff:ratio=0.25+sparse:sparsity=0.5,bits=8",
        ),
    ),
    Method(
        "l2norm",
        "hf_kvcache.policies.l2norm:L2Norm",
        "tokens",
        "Keys of small norm",
        "Devoto et al. 2024",
        "budget or ratio",
        page="eviction",
        arxiv="2406.11430",
        compared=(),
    ),
    Method(
        "expected_attention",
        "hf_kvcache.policies.expected_attention:ExpectedAttention",
        "tokens",
        "Tokens that future queries are expected to attend to, by the moments of past ones",
        "Expected Attention, Devoto et al. 2025",
        "budget or ratio, n_future=512",
        page="eviction",
        arxiv="2510.00636",
    ),
    Method(
        "triattention",
        "hf_kvcache.policies.triattention:TriAttention",
        "tokens",
        "Tokens that queries around their centre will look at, from all distances to come",
        "TriAttention, Mao et al. 2026",
        "budget or ratio, n_recent=128, n_future=65536, centres=None",
        page="eviction",
        arxiv="2604.04921",
        compared=(),
    ),
    Method(
        "lagkv",
        "hf_kvcache.policies.lagkv:LagKV",
        "tokens",
        "Tokens that stand out against the partition after theirs; no queries needed",
        "LagKV, Liang et al. 2025",
        "budget or ratio, lag=128",
        page="eviction",
        arxiv="2504.04704",
        compared=(),
    ),
    Method(
        "rkv",
        "hf_kvcache.policies.rkv:RKV",
        "tokens",
        "Tokens that are attended to and not redundant",
        "R-KV, Cai et al. 2025",
        "budget or ratio, n_queries=8, mix=0.1",
        page="eviction",
        arxiv="2505.24133",
        compared=(),
    ),
    Method(
        "nacl",
        "hf_kvcache.policies.nacl:NACL",
        "tokens",
        "Tokens that the newest queries attend to, and a random share",
        "NACL, Chen et al. 2024",
        "budget or ratio, random_share=2/3",
        page="eviction",
        arxiv="2408.03675",
        compared=(),
    ),
    Method(
        "kvzip",
        "hf_kvcache.policies.kvzip:KVzip",
        "tokens",
        "Tokens that the model looks at when it repeats the prompt, of all heads and layers: read twice, ragged",
        "KVzip, Kim et al. 2025",
        "budget or ratio, level='model', chunk=2048",
        page="eviction",
        arxiv="2505.23416",
        compared=(),
    ),
    Method(
        "random",
        "hf_kvcache.policies.random:Random",
        "tokens",
        "Tokens at random: the baseline",
        "",
        "budget or ratio, seed=0",
        page="eviction",
        compared=(),
    ),
    Method(
        "duo",
        "hf_kvcache.policies.duo:Duo",
        "tokens",
        "Retrieval heads keep all tokens, the others sinks and recent ones: ragged",
        "DuoAttention, Xiao et al. 2024",
        "gates, threshold=0.5, n_recent=256",
        page="eviction",
        arxiv="2410.10819",
        compared=(),
    ),
    Method(
        "fastgen",
        "hf_kvcache.policies.fastgen:FastGen",
        "tokens",
        "Each head keeps the cheapest set that recovers its attention: ragged",
        "FastGen, Ge et al. 2023",
        "recovery=0.95, local=0.3, heavy=0.3",
        page="eviction",
        arxiv="2310.01801",
        compared=(),
    ),
    Method(
        "threshold",
        "hf_kvcache.policies.threshold:Threshold",
        "tokens",
        "Any scorer's tokens above a score, or holding a share of the scores: ragged",
        "KVzap",
        "threshold or share, scorer='snapkv'",
        page="eviction",
        arxiv="2601.07891",
        compared=("threshold:share=0.9",),
    ),
    Method(
        "locret",
        "hf_kvcache.policies.locret:Locret",
        "tokens",
        "Tokens that trained retaining heads score highest; prompts in chunks",
        "Locret, Huang et al. 2024",
        "budget or ratio, stabilizers=None, n_recent=100",
        page="eviction",
        arxiv="2410.01805",
        compared=(
            "locret:ratio=0.25",
            "locret:ratio=0.125",
        ),
    ),
    Method(
        "dmc",
        "hf_kvcache.dmc.policies:DMC",
        "tokens",
        "Tokens merged into the newest row of their head where a retrofitted model says so: ragged",
        "DMC, Nawrot et al. 2024",
        "codec=None; a model from trainers/train_dmc.py",
        page="retrofits",
        arxiv="2403.09636",
        compared=(),
    ),
    Method(
        "dms",
        "hf_kvcache.dmc.policies:DMS",
        "tokens",
        "Tokens dropped a window later where a retrofitted model says so: ragged",
        "DMS, Lancucki et al. 2025",
        "codec=None; a model from trainers/train_dmc.py",
        page="retrofits",
        arxiv="2506.05345",
        compared=(),
    ),
)


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
