"""Measure hf_kvcache against its peers: verify, then time, then write JSON.

    python benchmarks/run.py                      # everything the device allows, into benchmarks/results/
    python benchmarks/run.py attention generate   # some of it
    python benchmarks/run.py --device cuda

CPU times are only good as ratios within one run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import against_kvpress
import attention
import eviction
import generation
import long_prompt
import memory
import projection
import prompts
import pruning
import ragged
import recall
import retrofit
import serving
import torch
from rich.console import Console
from rich.table import Table

from hf_kvcache.bench.environment import environment
from hf_kvcache.commands.numbers import positive
from hf_kvcache.models import resolve

SUITES = {
    "attention": attention.decode_step,
    "scaling": attention.scaling,
    "prompts": prompts.prompts,
    "prefill": generation.prefill,
    "generate": generation.decode,
    "equal-memory": generation.equal_memory,
    "heads": ragged.heads,
    "memory": memory.process_memory,
    "long-prompt": long_prompt.long_prompt,
    "pruning": pruning.pruning,
    "projection": projection.projection,
    "eviction": eviction.eviction,
    "recall": recall.recall,
    "kvpress": against_kvpress.against_kvpress,
    "retrofit": retrofit.retrofit,
    "realised": retrofit.realised,
    "serving": serving.serving,
    "retrofit-prefill": serving.retrofit_prefill,
}
# the op has no kernel for a GPU
ON_CPU = ("prompts",)
# drawn beside the JSON, where matplotlib is installed
PICTURES = {"long-prompt": long_prompt.picture, "retrofit": retrofit.picture}
# these measure what a model says, not how fast, and take --model, --text and --context
QUALITY = ("pruning", "projection", "eviction", "kvpress", "retrofit")
# these need models or programs that are not there by themselves
ON_REQUEST = {"kvpress": "kvpress_python", "retrofit": "retrofits", "realised": "retrofits"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help=f"any of: {', '.join(SUITES)} (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    parser.add_argument("--rounds", type=positive, default=15, help="timed calls per contestant (default 15)")
    quality = parser.add_argument_group("quality suites (pruning, projection, eviction, kvpress)")
    quality.add_argument("--model", help="Hub id or local folder (default: the embedded model)")
    quality.add_argument("--text", help="text file to predict (default: the package's own prose)")
    quality.add_argument("--context", type=positive, default=2048, help="tokens of a window (default 2048)")
    quality.add_argument("--adapter", help="folder of retaining heads for eviction (default: the embedded model's)")
    parser.add_argument("--kvpress-python", help="interpreter of an environment with kvpress, for that suite")
    parser.add_argument("--retrofits", help="folder of models from trainers/train_dmc.py, for those suites")
    options = parser.parse_args(arguments)
    options.model = options.model and resolve(options.model)
    unknown = set(options.suites) - set(SUITES)
    if unknown:
        parser.error(f"no suite is called {', '.join(sorted(unknown))}")
    elsewhere = set(options.suites) & set(ON_CPU) if options.device != "cpu" else ()
    if elsewhere:
        parser.error(f"{', '.join(elsewhere)}: only --device cpu")
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    able = [name for name in SUITES if options.device == "cpu" or name not in ON_CPU]
    everything = [name for name in able if name not in ON_REQUEST or getattr(options, ON_REQUEST[name])]
    for name in options.suites or everything:
        started = time.time()
        rows = SUITES[name](options)
        console.print(as_table(name, rows))
        seconds = round(time.time() - started, 1)
        result = {"suite": name, "seconds": seconds, **environment(options.device), "rows": rows}
        stem = name
        if name in QUALITY:
            model = Path(options.model).name if options.model else "embedded"
            result |= {"model": model, "context": options.context}
            stem = f"{name}-{model}"
        path = options.out / f"{stem}-{options.device}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"{path}\n")
        if name in PICTURES and find_spec("matplotlib"):
            PICTURES[name](rows, path.with_suffix(".png"))
    return 0


def as_table(title: str, rows: list[dict]) -> Table:
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="left" if isinstance(rows[0].get(column), str) else "right")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    return table


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
