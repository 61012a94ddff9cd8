"""Published benchmarks of long texts: LongBench, LongBench v2, InfiniteBench and L-Eval, from files or from the Hub."""

from __future__ import annotations

from hf_kvcache.eval.benchmarks import infinitebench, leval, longbench, longbench_v2
from hf_kvcache.eval.benchmarks.datasets import DataSet, Kind
from hf_kvcache.eval.benchmarks.loading import NoRows, Source

KINDS = {
    kind.name: kind
    for kinds in (longbench.kinds(), longbench_v2.kinds(), infinitebench.kinds(), leval.kinds())
    for kind in kinds
}
# names that stand for several
GROUPS = {
    "longbench": tuple(f"longbench:{name}" for name in longbench.SETS),
    "longbench_e": tuple(f"longbench:{name}_e" for name in longbench.EVEN),
    "infinitebench": tuple(f"infinitebench:{name}" for name in infinitebench.SETS),
    "leval": tuple(f"leval:{name}" for name in leval.SETS),
}

__all__ = ["GROUPS", "KINDS", "DataSet", "Kind", "NoRows", "Source", "is_named", "markdown", "named"]


def is_named(name: str) -> bool:
    """Whether a name is meant to be that of a benchmark."""
    return name in GROUPS or name.partition(":")[0] in {kind.benchmark for kind in KINDS.values()}


def named(name: str, source: Source, seed: int | None = None) -> list[DataSet]:
    """The data sets that a name stands for: "longbench:multi_news", "leval".

    Args:
        name: of one, or of a group.
        source: where their rows are read, once they are needed.
        seed: of the order of their rows; None for the published one.

    Raises:
        ValueError: there is no such one.
    """
    if name not in GROUPS and name not in KINDS:
        of = [known for known in KINDS if known.startswith(name.partition(":")[0] + ":")]
        raise ValueError(f"no data set is called {name!r}; there are {', '.join(of)}; groups: {', '.join(GROUPS)}")
    prompts = source.beside(longbench.PROMPTS)
    kinds = KINDS | ({kind.name: kind for kind in longbench.kinds(prompts)} if prompts else {})
    return [DataSet(kinds[member], source, seed) for member in GROUPS.get(name, (name,))]


def markdown() -> str:
    """Table of data sets for docs/evaluation.md."""
    rows = []
    for kind in KINDS.values():
        score = kind.score.__name__
        rows.append(f"| `{kind.name}` | {kind.summary} | {score} |")
    return "\n".join(["| data set | what is asked for | scored by |", "|---|---|---|", *rows])
