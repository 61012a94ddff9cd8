"""The tables of docs/evaluation.md that are measured: kvpress on the same instances, and what published tables claim.

`python benchmarks/tables.py` writes them.
"""

from __future__ import annotations

import json
from pathlib import Path

from hf_kvcache.eval.front_report import table

RESULTS = Path(__file__).parent / "results"


def claims() -> str:
    """What published tables say, and what the evaluation says of it."""
    found = _load("claims-smollm2")
    lines = [["better", "worse", "question", "published", "ours: difference, 95 %", "verdict"], ["---"] * 6]
    for row in found["rows"]:
        said = f"{row['said']} ({row['source']})"
        verdict = row["verdict"] + (f": {row['reason']}" if row["reason"] else "")
        shown = "–" if row["difference"] is None else _difference(*(row["difference"][end] for end in _ENDS))
        lines.append([f"`{row['better']}`", f"`{row['worse']}`", row["setting"], said, shown, verdict])
    return f"{table(lines)}\n\n{_where(found, 'python benchmarks/claims.py DIR …')}"


def presses() -> str:
    """kvpress and ours on the same instances."""
    found = _load("presses-smollm2")
    lines = [["press", "question", "kvpress", "ours, its conventions", "difference, 95 %", "same answers", "ours, n"]]
    lines.append(["---", "---", *["---:"] * 5])
    for row in found["rows"]:
        scores = (row[name] for name in ("kvpress score", "score", "default score"))
        theirs, alike, own = ("–" if score is None else f"{100 * score:.0f}" for score in scores)
        same = f"{100 * row['same answers']:.0f} %"
        difference = _difference(*row["difference"])
        lines.append([row["press"], row["setting"], theirs, alike, difference, same, f"{own}, {row['n']}"])
    return (
        f"{table(lines)}\n\n{_where(found, 'python benchmarks/evaluate_presses.py --kvpress-python PYTHON --out DIR')}"
    )


def same_answers() -> str:
    """Answers of the embedded model, which knows nothing and is cheap: how many are the same token for token."""
    found = _load("presses-embedded")
    lines = [["press", "ours, its conventions", "question known", "question unknown"], ["---", "---", "---:", "---:"]]
    rows: dict[str, dict[str, dict]] = {}
    for row in found["rows"]:
        rows.setdefault(row["press"], {})[row["setting"]] = row
    for name, own in rows.items():
        shown = (
            f"{round(row['same answers'] * row['n'])} of {row['n']}" if row else "–" for row in map(own.get, _BOTH)
        )
        lines.append([name, f"`{own[next(iter(own))]['ours']}`", *shown])
    command = (
        "python benchmarks/evaluate_presses.py --kvpress-python PYTHON --model EMBEDDED --conventions-only --out DIR"
    )
    return f"{table(lines)}\n\n{_where(found, command)}"


_BOTH = "known", "unknown"
_ENDS = "mean", "low", "high"
BLOCKS = {"claims": claims, "presses": presses, "same-answers": same_answers}


def _load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}-cpu.json").read_text(encoding="utf-8"))


def _difference(mean: float, low: float | None, high: float | None) -> str:
    return f"{100 * mean:+.1f}" + ("" if low is None else f" ({100 * low:+.1f} … {100 * high:+.1f})")


def _where(found: dict, command: str) -> str:
    """Command, model, machine and versions."""
    parts = [f"`{command}`", found["model"], found["dtype"], found["device"], f"threads: {found['threads']}"]
    parts += [f"{name} {version}" for name, version in found["versions"].items() if name in _VERSIONS and version]
    return ", ".join([*parts, f"commit {found['commit']}"])


_VERSIONS = "torch", "transformers", "kvpress"
