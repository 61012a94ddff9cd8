"""The trained families on a real model: calibrated low rank, retaining heads (Locret) and retrofits (DMS), on a CPU.

    python benchmarks/trained.py lowrank --data books --work FOLDER
    python benchmarks/trained.py heads --data books --work FOLDER
    python benchmarks/trained.py retrofit --data books --work FOLDER

`books` has the folders `train` and `valid` of .txt files. What is trained goes to `FOLDER`, with recordings,
checkpoints and answers: the same command goes on where it was stopped. Rows are added to `--json` as they are measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import trained_heads
import trained_lowrank
import trained_retrofit
from trained_rows import Rows

from hf_kvcache.bench.environment import environment

PARTS = {"lowrank": trained_lowrank.lowrank, "heads": trained_heads.heads, "retrofit": trained_retrofit.retrofit}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--model", default="smollm2", help="name or path (default: %(default)s)")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and valid/")
    parser.add_argument("--work", type=Path, required=True, help="folder for adapters, recordings and answers")
    parser.add_argument("--only", nargs="+", help="names of the runs of a part (default: all)")
    parser.add_argument("--instances", type=int, default=20, help="of every task (default: %(default)s)")
    results = Path(__file__).parent / "results"
    parser.add_argument("--json", type=Path, default=results / "trained-smollm2-cpu.json", help="file of the rows")
    options = parser.parse_args(arguments)
    rows = Rows(options.json, {"suite": "trained", "model": options.model, **environment()})
    for part in options.parts:
        PARTS[part](options, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
