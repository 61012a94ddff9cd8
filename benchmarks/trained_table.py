"""What was trained for SmolLM2 beside what was not, on the same instances: a table of docs/evaluation.md.

`python benchmarks/tables.py` writes it, from what `quality.py` has packed: a file without an adapter, and one of each.
"""

from __future__ import annotations

import json
from pathlib import Path

from hf_kvcache.eval.front_report import percent, table
from hf_kvcache.eval.intervals import difference_of, mean_of

RESULTS = Path(__file__).parent / "results"
ADAPTERS = "locret", "palu", "dms"
UNTRAINED = "kvzip", "snapkv", "h2o", "expected_attention", "keydiff"
BESIDE = (
    *("quant:bits=4", "quant:bits=2", "lowrank:rank=0.5,bits=4"),
    *(f"{name}:ratio={ratio}" for name in UNTRAINED for ratio in (0.25, 0.125)),
)
DENSE, SETTING = "dynamic", "unknown"


def trained() -> str:
    """By cache: bytes, and the score of every task that adapters were asked, on instances that all have answered.

    All are compared with the dense cache of the model as it came: what else training has changed shall count.
    """
    files = {name: _load(name) for name in ("", *ADAPTERS)}
    cells = {
        (cell["cache"] + (f" @ {name}" if name else ""), cell["task"]): cell
        for name, file in files.items()
        for cell in file["cells"]
        if cell["setting"] == SETTING
    }
    own = dict.fromkeys(cache for cache, _ in cells if " @ " in cache and not cache.startswith(DENSE))
    asked = [task for task in dict.fromkeys(task for _, task in cells) if all((c, task) in cells for c in own)]
    caches = [DENSE, *own, *(name for name in BESIDE if any((name, task) in cells for task in asked))]
    common = {
        task: set.intersection(*(set(cells[cache, task]["instances"]) for cache in caches if (cache, task) in cells))
        for task in asked
    }
    heads = [part for task in asked for part in (f"`{task}`, n = {len(common[task])}", "to dense, 95 %")]
    lines = [["cache", "bytes", *heads], ["---", *["---:"] * (1 + len(heads))]]
    for cache in caches:
        pairs = {task: (cells[cache, task], cells[DENSE, task]) for task in asked if (cache, task) in cells}
        sizes = [theirs["nbytes"] / exact["nbytes"] for theirs, exact in pairs.values()]
        scores = [part for task in asked for part in _scores(pairs.get(task), common[task], cache == DENSE)]
        lines.append([f"`{cache}`", f"{sum(sizes) / len(sizes):.3f}", *scores])
    runs = [piece for name in ADAPTERS for piece in files[name]["pieces"]]
    machines = ", ".join(dict.fromkeys(piece["device"] for piece in runs))
    where = f"`python benchmarks/quality.py --settings unknown --adapters DIR`, {runs[-1]['dtype']}, {machines}"
    return (
        f"{table(lines)}\n\n{where}, transformers {runs[-1]['versions']['transformers']}, commit {runs[-1]['commit']}"
    )


def _scores(pair: tuple[dict, dict] | None, instances: set[int], is_dense: bool) -> list[str]:
    """The score of a cell, and the difference to the dense cache on the same instances."""
    if pair is None:
        return ["–"] * 2
    ours, dense = (
        [score for i, score in zip(cell["instances"], cell["scores"], strict=True) if i in instances] for cell in pair
    )
    change, ends = percent(difference_of(ours, dense), "+")
    return [percent(mean_of(ours), "")[0], "–" if is_dense else f"{change} ({ends})"]


def _load(adapter: str) -> dict:
    name = f"quality-smollm2-{adapter}{'-' * bool(adapter)}cpu.json"
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


BLOCKS = {"trained": trained}
