"""A report of several evaluations: fronts of score over bytes, as JSON and as Markdown."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from hf_kvcache.eval.front import Dominated, Front, Point
from hf_kvcache.eval.intervals import Estimate
from hf_kvcache.eval.running import SETTINGS

CAPTION = (
    "level: the nearest of 1, 2, 4, 8 and 16 times smaller. bytes: as a share of DynamicCache's, once both had "
    "compressed what they had read. score: mean of the tasks above, in percent, with its 95 % interval. to dense: "
    "paired difference on the same instances, in points. beaten by: a cache of the same or fewer bytes whose score is "
    "not lower, how many points it is ahead on the same instances, and whether their 95 % interval excludes none; a "
    "dash is the front. answer: tokens, in brackets those of DynamicCache to the same questions. n: instances of "
    "every task; failed answers behind a plus."
)


@dataclass(frozen=True)
class Report:
    """What is written to report.json.

    Attributes:
        model, dtype, device: of the evaluations.
        least: see `fronts`.
        runs: the first line of every evaluation.
        notes: what a reader has to know.
        fronts: one for every setting and length.
    """

    model: str
    dtype: str
    device: str
    least: float
    runs: list[dict]
    notes: list[str]
    fronts: list[Front]

    def as_dict(self) -> dict:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict) -> Report:
        """What `as_dict` made."""
        return cls(**found | {"fronts": [_front(front) for front in found["fronts"]]})


def make_report(gathered, found: list[Front], least: float, notes: list[str]) -> Report:
    """Fronts and where they come from."""
    about = gathered.about[0]
    notes = [*gathered.notes, *notes]
    if about["dtype"] == "float32":
        notes.append(
            "The dense cache has 4 bytes a number here. In 16 bits it is half as large, so that caches that pack bits "
            "save up to half as much."
        )
    return Report(about["model"], about["dtype"], about["device"], least, gathered.about, notes, found)


def as_markdown(report: Report) -> str:
    """A section for every setting and length: all caches by level, then the scores of tasks."""
    parts = [f"# {report.model}, {report.dtype}, {report.device}", *report.notes]
    for front in report.fronts:
        parts.append(f"## {front.setting}, {front.length:,} tokens\n\n{front.setting}: {SETTINGS[front.setting]}.")
        parts.append(tasks_of(front, report.least))
        parts.append(as_table(front))
        if front.left_out:
            parts.append("Left out: " + "; ".join(f"`{name}` ({why})" for name, why in front.left_out.items()) + ".")
        if len(front.tasks) + len(front.apart) > 1:
            parts.append(_tasks_table(front))
    return "\n\n".join([*parts, CAPTION]) + "\n"


def tasks_of(front: Front, least: float) -> str:
    """Which tasks scores are means of, and which stand apart."""
    said = f"Mean of {', '.join(f'`{task}`' for task in front.tasks)}."
    if front.apart:
        apart = ", ".join(f"`{task}` ({100 * score:.1f})" for task, score in front.apart.items())
        said += f" Not in it, as DynamicCache itself scores below {100 * least:g}: {apart}."
    if front.begun:
        begun = ", ".join(f"`{task}`" for task in front.begun)
        said += f" Not in it, as fewer than half of the caches have been asked: {begun}."
    return said


def as_table(front: Front) -> str:
    """All caches, by level, then by score."""
    has_speed = any(point.speed is not None for point in front.points)
    head = ["level", "cache", "bytes", "score", "95 %", "to dense", "95 %", "beaten by", "answer"]
    head += ["speed", "n"] if has_speed else ["n"]
    rows = sorted(front.points, key=lambda point: (point.level, -point.score.mean, point.bytes_ratio))
    lines = [head, ["---:", "---", *["---:"] * 5, "---", *["---:"] * (len(head) - 8)]]
    for point in rows:
        n = f"{point.n_instances} + {point.n_failed}" if point.n_failed else str(point.n_instances)
        cells = [f"{point.level}×", f"`{point.cache}`", f"{point.bytes_ratio:.3f}", *percent(point.score, "")]
        cells += [*percent(point.difference, "+"), beaten(point)]
        cells.append(f"{point.n_answer:.1f} ({point.n_answer_dense:.1f})")
        if has_speed:
            cells.append("–" if point.speed is None else f"{point.speed:.2f}×")
        lines.append([*cells, n])
    return table(lines)


def beaten(point: Point) -> str:
    """What dominates a point, in words."""
    if point.dominated is None:
        return "–"
    found = point.dominated.difference
    return f"`{point.dominated.by}`, {100 * found.mean:+.1f}, {'beyond' if point.dominated.is_beyond else 'within'}"


def percent(found: Estimate | None, sign: str) -> tuple[str, str]:
    """Mean and interval in percent."""
    if found is None:
        return "–", "–"
    ends = "–" if found.low is None else f"{100 * found.low:{sign}.1f} … {100 * found.high:{sign}.1f}"
    return f"{100 * found.mean:{sign}.1f}", ends


def table(lines: list[list[str]]) -> str:
    """A Markdown table of a head, its rule and rows."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _tasks_table(front: Front) -> str:
    names = [*front.tasks, *front.apart]
    lines = [["cache", *names], ["---", *["---:"] * len(names)]]
    for point in front.points:
        found = (point.tasks.get(name) for name in names)
        lines.append([f"`{point.cache}`", *("–" if one is None else f"{100 * one.mean:.1f}" for one in found)])
    return table(lines)


def _front(found: dict) -> Front:
    return Front(**found | {"points": [_point(point) for point in found["points"]]})


def _point(found: dict) -> Point:
    parts = {name: _estimate(found[name]) for name in ("score", "difference", "behind")}
    if found["dominated"] is not None:
        parts["dominated"] = Dominated(
            **found["dominated"] | {"difference": _estimate(found["dominated"]["difference"])}
        )
    parts["tasks"] = {name: _estimate(one) for name, one in found["tasks"].items()}
    return Point(**found | parts)


def _estimate(found: dict | None) -> Estimate | None:
    return None if found is None else Estimate(**found)
