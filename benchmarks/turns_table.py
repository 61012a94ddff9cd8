"""Questions that follow each other in one cache: a table of docs/choosing.md, by turn.

`python benchmarks/tables.py` writes it, from what `quality.py --questions N --settings unknown turns` has packed.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

from hf_kvcache.eval.front_report import percent, table
from hf_kvcache.eval.intervals import difference_of

FILE = Path(__file__).parent / "results" / "quality-smollm2-4-questions-cpu.json"
DENSE = "dynamic"
# score of every question and text of one task, by (cache, setting): [question][instance]
Scores = dict[tuple[str, str], list[dict[int, float]]]


def turns() -> str:
    """By cache: bytes; questions of copies; every turn; all turns, and their difference to the dense cache."""
    if not FILE.exists():
        return "Not measured yet."
    found = json.loads(FILE.read_text(encoding="utf-8"))
    (task, length), *others = dict.fromkeys((cell["task"], cell["length"]) for cell in found["cells"])
    if others:
        raise ValueError(f"a table by turn is of one task and length, not of {(task, length)} and {others}")
    scores, common = gathered(found["cells"])
    nbytes = {cell["cache"]: cell["nbytes"] for cell in found["cells"]}
    n = len(scores[DENSE, "turns"])
    heads = ["of copies", *(f"turn {q + 1}" for q in range(n)), "all turns", "to dense, 95 %"]
    lines = [["cache", "bytes", *heads], ["---", *["---:"] * (n + 4)]]
    for cache in nbytes:
        of_copies, own = (by_text(scores[cache, setting], common) for setting in ("unknown", "turns"))
        shown = [fmean(of_copies), *(fmean(turn[i] for i in common) for turn in scores[cache, "turns"]), fmean(own)]
        change, ends = percent(difference_of(own, by_text(scores[DENSE, "turns"], common)), "+")
        share = nbytes[cache] / nbytes[DENSE]
        by_turn = [f"{100 * score:.0f}" for score in shown]
        lines.append([f"`{cache}`", f"{share:.3f}", *by_turn, "–" if cache == DENSE else f"{change} ({ends})"])
    run = found["pieces"][-1]
    command = f"`python benchmarks/quality.py --questions {n} --settings unknown turns --batch-size 1 --tasks {task}`"
    where = f"{run['model']}, {run['dtype']}, {run['device']}, transformers {run['versions']['transformers']}"
    head = f"`{task}`, {length:,} tokens, {len(common)} texts, {n} questions about each."
    return f"{head}\n\n{table(lines)}\n\n{command}, {where}, commit {run['commit']}"


def gathered(cells: list[dict]) -> tuple[Scores, list[int]]:
    """Scores by cache, setting, question and text, and the texts of which all caches were asked all questions."""
    scores: Scores = {}
    for cell in sorted(cells, key=lambda cell: cell["question"]):
        own = dict(zip(cell["instances"], cell["scores"], strict=True))
        scores.setdefault((cell["cache"], cell["setting"]), []).append(own)
    return scores, sorted(set.intersection(*(set(own) for questions in scores.values() for own in questions)))


def by_text(questions: list[dict[int, float]], texts: list[int]) -> list[float]:
    """The mean of all questions about each text: answers about one text are not independent."""
    return [fmean(own[i] for own in questions) for i in texts]


BLOCKS = {"choose-turns": turns}
