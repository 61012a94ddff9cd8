"""Which cache to take, from the results of `hf-kvcache report`: the tables of docs/choosing.md and of the README.

`python benchmarks/tables.py` writes them; `benchmarks/results/evidence-smollm2-cpu.json` is a report.json.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import hf_kvcache as kv
from hf_kvcache.eval.front import Front, Point
from hf_kvcache.eval.front_report import Report, percent, table, tasks_of
from hf_kvcache.eval.intervals import Estimate
from hf_kvcache.eval.peers import PEERS
from hf_kvcache.eval.specs import SpecError, parse

FILE = Path(__file__).parent / "results" / "evidence-smollm2-cpu.json"
PICTURE = Path(__file__).parents[1] / "docs" / "front.png"
COMMAND = "hf-kvcache report DIR …"
LEVELS = (2, 4, 8, 16)
# points below the dense cache that are called nothing
NEARLY = 0.01


@cache
def evidence() -> Report:
    """The report that all tables are made of."""
    return Report.from_dict(json.loads(FILE.read_text(encoding="utf-8")))


def front_of(report: Report, setting: str) -> Front | None:
    """The front of a setting, of the longest texts; None where that was not asked."""
    found = [front for front in report.fronts if front.setting == setting]
    return max(found, key=lambda front: front.length, default=None)


def choices(front: Front | None) -> list[Point]:
    """What can be chosen: all caches but the dense one and those of other libraries."""
    points = [] if front is None else front.points
    return [p for p in points if p.difference is not None and not p.cache.startswith("kvpress:")]


def best(points: list[Point], level: int) -> Point | None:
    """The best score of caches that are as small as a level asks for, or smaller; of equal ones the smallest."""
    own = [point for point in points if point.level >= level]
    return max(own, key=lambda point: (point.score.mean, -point.bytes_ratio), default=None)


def alike(points: list[Point], first: Point) -> list[Point]:
    """Others of its level that the interval of the difference to the best does not tell from it, best first.

    Both are compared by what each is from the best of all points of the level.
    """
    own = [p for p in points if p.level == first.level and p is not first]
    near = [p for p in own if p.behind is None or p.behind.low is None or p.behind.low <= 0]
    return sorted(near, key=lambda point: -point.score.mean)


def by_level(setting: str) -> str:
    """The best of every level in one setting."""
    front = front_of(evidence(), setting)
    points = choices(front)
    if front is None or not points:
        return f"Not measured yet with the question {setting}."
    lines = [["smaller", "take", "bytes", "score", "95 %", "to dense", "95 %", "not told apart from it"]]
    lines.append(["---:", "---", *["---:"] * 5, "---"])
    for level in LEVELS:
        point = best(points, level)
        if point is None:
            lines.append([f"{level}×", "none was measured", *["–"] * 6])
        else:
            lines.append([f"{level}×", *_cells(point), _names(alike(points, point))])
    n = min(point.n_instances for point in points)
    dense = next(point for point in front.points if point.difference is None)
    head = f"{front.length:,} tokens, {n} instances of every task. {tasks_of(front, evidence().least)}"
    return f"{head} Dense: {100 * dense.score.mean:.1f}.\n\n{table(lines)}"


def nearly_lossless() -> str:
    """The smallest caches that lose no more than `NEARLY` in any setting, by the mean and by the whole interval."""
    points = _in_all_settings()
    if not points:
        return "Not measured yet."
    lines = [["what is lost", "take", "bytes", *(f"to dense, {front.setting}" for front in _fronts())]]
    lines.append(["---", "---", *["---:"] * (len(lines[0]) - 2)])
    asked = (
        (f"at most {100 * NEARLY:g} point by the mean", lambda found: found.mean >= -NEARLY),
        (f"no more than {100 * NEARLY:g} point, with 95 % confidence", lambda found: (found.low or -1) >= -NEARLY),
    )
    for what, is_near in asked:
        near = {name: own for name, own in points.items() if all(is_near(point.difference) for point in own)}
        if not near:
            lines.append([what, "none: more instances are needed to say so", *["–"] * (len(lines[0]) - 2)])
            continue
        name = min(near, key=lambda name: max(point.bytes_ratio for point in near[name]))
        size = max(point.bytes_ratio for point in near[name])
        lines.append([what, spelled(name), f"{size:.3f}", *(_with_interval(point.difference) for point in near[name])])
    return table(lines)


def sixteenth() -> str:
    """The best of the last level in every setting."""
    lines = [["question", "take", "bytes", "score", "95 %", "to dense", "95 %"], ["---", "---", *["---:"] * 5]]
    for front in _fronts():
        point = best(choices(front), LEVELS[-1])
        lines.append([front.setting, *(["none was measured", *["–"] * 5] if point is None else _cells(point))])
    return table(lines)


def key_biases() -> str:
    """The best at 2 and 4 times of caches whose keys never share a scale with other channels in few bits."""
    lines = [["question", "smaller", "take", "bytes", "score", "95 %", "to dense", "95 %"]]
    lines.append(["---", "---:", "---", *["---:"] * 5])
    for front in _fronts():
        points = [point for point in choices(front) if bears_key_biases(point.cache)]
        for level in (2, 4):
            point = best(points, level)
            cells = ["none was measured", *["–"] * 5] if point is None else _cells(point)
            lines.append([front.setting, f"{level}×", *cells])
    return table(lines)


def bears_key_biases(cache: str) -> bool:
    """Whether no key is rounded to fewer than 8 bits with a scale per token, which large biases ruin."""
    name = cache.partition(" @ ")[0].partition(":")[0]
    if name in PEERS:
        # fp8 has one scale for all channels of a layer, the others group within a token
        return name == "dynamic"
    codec = parse(cache.partition(" @ ")[0]).build().codec
    return codec is None or all(
        part["bits"] >= 8 or part["axis"] == "channel" for part in _parts(codec[0].spec()) if "bits" in part
    )


def _parts(spec: dict) -> list[dict]:
    """Every codec of a chain."""
    return [spec, *(part for value in spec.values() if isinstance(value, dict) for part in _parts(value))]


def readme() -> str:
    """What the README shows: the best of every level, by what the cache knows when it compresses."""
    lines = [["you want", "take", "bytes, of dense", "score, of dense", "difference, 95 %"]]
    lines.append(["---", "---", "---:", "---:", "---:"])
    wanted = {"known": "one question, known when the cache compresses", "unknown": "several questions about one text"}
    for setting, words in wanted.items():
        front = front_of(evidence(), setting)
        dense = None if front is None else next(point for point in front.points if point.difference is None)
        for level in LEVELS:
            point = best(choices(front), level)
            if point is not None:
                scores = f"{100 * point.score.mean:.0f} of {100 * dense.score.mean:.0f}"
                found = [spelled(point.cache), f"{point.bytes_ratio:.2f}", scores, _with_interval(point.difference)]
                lines.append([f"{words}, {level}× smaller", *found])
    return f"{table(lines)}\n\n{_asked()}; {where()}"


def _asked() -> str:
    """How much was asked."""
    front = _fronts()[0]
    n = min(point.n_instances for point in front.points)
    tasks = f"{len(front.tasks)} task{'s' * (len(front.tasks) > 1)}"
    return f"{front.length:,} tokens, {n} instances of each of {tasks}"


def spelled(cache: str) -> str:
    """A cache in Python, and the adapter that it goes by; as it is typed where it is not ours."""
    cache, _, adapter = cache.partition(" @ ")
    if adapter:
        return f"{spelled(cache)}, adapter `{adapter}`"
    try:
        spec = parse(cache)
    except SpecError:
        return f"`{cache}`"
    if spec.is_peer:
        return f"`{cache}` (transformers)"
    knobs = [f"{name}={value!r}" for name, value in spec.knobs.items()]
    if spec.policy is None:
        return f"`kv.{spec.factory.__name__}({', '.join(knobs)})`"
    own = [f"{name}={value!r}" for name, value in spec.policy_knobs.items()]
    policy = f"kv.{spec.policy.__name__}({', '.join(own)})"
    assert hasattr(kv, spec.policy.__name__), policy
    return f"`kv.{spec.factory.__name__}({', '.join([*knobs, f'policy={policy}'])})`"


def where() -> str:
    """The command, and where it ran."""
    report = evidence()
    run = report.runs[0]
    versions = [f"{name} {run['versions'][name]}" for name in ("torch", "transformers")]
    return ", ".join([f"`{COMMAND}`", report.model, report.dtype, report.device, *versions, f"commit {run['commit']}"])


def _fronts() -> list[Front]:
    settings = dict.fromkeys(front.setting for front in evidence().fronts)
    return [front_of(evidence(), setting) for setting in settings]


def _in_all_settings() -> dict[str, list[Point]]:
    found = [{point.cache: point for point in choices(front)} for front in _fronts()]
    return {name: [own[name] for own in found] for name in (found[0] if found else ()) if all(name in o for o in found)}


def _cells(point: Point) -> list[str]:
    return [
        spelled(point.cache),
        f"{point.bytes_ratio:.3f}",
        *percent(point.score, ""),
        *percent(point.difference, "+"),
    ]


def _with_interval(found: Estimate) -> str:
    mean, ends = percent(found, "+")
    return f"{mean} ({ends})"


def _names(points: list[Point], most: int = 4) -> str:
    names = ", ".join(f"`{point.cache}`" for point in points[:most]) or "–"
    return names + (f" and {len(points) - most} more" if len(points) > most else "")


# what stands in a block of docs/choosing.md, and in the README
BLOCKS = {
    "choose-unknown": lambda: by_level("unknown"),
    "choose-known": lambda: by_level("known"),
    "choose-lossless": nearly_lossless,
    "choose-sixteenth": sixteenth,
    "choose-biases": key_biases,
    "choose-where": where,
}
