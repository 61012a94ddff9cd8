"""The front of an evaluation: which caches score best for their bytes, and what beats the others."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from hf_kvcache.eval.gathering import Gathered, baseline_of
from hf_kvcache.eval.intervals import Estimate
from hf_kvcache.eval.lines import Line
from hf_kvcache.eval.pareto import dominators, level_of
from hf_kvcache.eval.running import SETTINGS
from hf_kvcache.eval.scores import Scores

# tasks that the dense model scores below have no score to lose: they say nothing of a cache
LEAST_DENSE = 0.1


@dataclass(frozen=True)
class Dominated:
    """What beats a cache.

    Attributes:
        by: a cache of the same or fewer bytes whose score is not lower.
        difference: its score minus this one's, on the instances that both have.
        is_beyond: whether the interval of that difference excludes zero.
    """

    by: str
    difference: Estimate
    is_beyond: bool


@dataclass(frozen=True)
class Point:
    """One cache in one setting and length; scores are means of the tasks that the dense model can do.

    Attributes:
        cache: its specification, " @ adapter" behind it where there are several.
        bytes_ratio: bytes as a share of the dense cache's, once both had compressed what they had read.
        level: the nearest of 1, 2, 4, 8 and 16 times smaller.
        score: of the cache.
        difference: to the dense cache on the same instances; None for itself.
        n_instances, n_failed: instances of the task that has fewest; questions that ended in an error.
        n_answer, n_answer_dense: mean tokens of its answers, and of the dense cache's on the same instances.
        speed: decoded tokens per second as a share of the dense cache's in the same run; None where it is not known.
        dominated: what beats it; None on the front.
        behind: the best score of the level minus this one's; None for the best itself.
        tasks: score of every task, those that the dense model cannot do included.
    """

    cache: str
    bytes_ratio: float
    level: int
    score: Estimate
    difference: Estimate | None
    n_instances: int
    n_failed: int
    n_answer: float
    n_answer_dense: float
    speed: float | None = None
    dominated: Dominated | None = None
    behind: Estimate | None = None
    tasks: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Front:
    """All caches in one setting and length.

    Attributes:
        setting, length: which are never mixed.
        tasks: that the dense model can do, of which scores are means.
        apart: tasks that it cannot do, with its score.
        points: by bytes, largest first.
        left_out: caches without a score of every task, and why.
        begun: tasks that fewer than half of the caches have been asked so far, of which nothing is in a mean.
    """

    setting: str
    length: int
    tasks: list[str]
    apart: dict[str, float]
    points: list[Point]
    left_out: dict[str, str]
    begun: list[str] = field(default_factory=list)


def fronts(gathered: Gathered, least: float = LEAST_DENSE, speeds: dict[str, float] | None = None) -> list[Front]:
    """The front of every setting and length, in the order of `SETTINGS`, short texts first.

    Args:
        gathered: answers.
        least: mean score of the dense cache below which a task stands apart.
        speeds: of caches, see `Point.speed`.

    Raises:
        ValueError: in no setting the dense cache has answers, and can do a task.
    """
    groups: dict[tuple[str, int], list[Line]] = defaultdict(list)
    for line in gathered.lines:
        groups[line.setting, line.length].append(line)
    order = sorted(groups, key=lambda key: (list(SETTINGS).index(key[0]), key[1]))
    scores = {key: Scores(groups[key], gathered.n_questions, least) for key in order}
    found = [front for key, own in scores.items() if (front := _front(own, *key, speeds or {})) is not None]
    if not found:
        raise ValueError(
            f"there is no task of which the dense cache has a mean score of {least:g} or more: nothing can be lost"
        )
    return found


def _front(scores: Scores, setting: str, length: int, speeds: dict[str, float]) -> Front | None:
    """All points, and what beats them; None where the dense cache has no answers, or can do none of the tasks."""
    if not scores.tasks:
        return None
    sizes = {cache: scores.bytes_ratio(cache) for cache in scores.caches if cache not in scores.left_out}
    caches = sorted(sizes, key=lambda cache: -sizes[cache])
    beaten = dominators([sizes[cache] for cache in caches], lambda a, b: scores.gain(caches[a], caches[b]))
    rank = {cache: (scores.score(cache).mean, -sizes[cache]) for cache in caches}
    best = {level_of(sizes[cache]): cache for cache in sorted(caches, key=rank.get)}
    points = []
    for cache, by in zip(caches, beaten, strict=True):
        level, dense = level_of(sizes[cache]), baseline_of(cache)
        n_answer, n_answer_dense = scores.n_answer(cache)
        point = Point(
            cache,
            bytes_ratio=sizes[cache],
            level=level,
            score=scores.score(cache),
            difference=None if cache == dense else scores.difference(cache, dense),
            n_instances=scores.n_instances(cache),
            n_failed=scores.n_failed(cache),
            n_answer=n_answer,
            n_answer_dense=n_answer_dense,
            speed=speeds.get(cache),
            dominated=None if by is None else _dominated(caches[by], scores.difference(caches[by], cache)),
            behind=None if cache == best[level] else scores.difference(best[level], cache),
            tasks=scores.scores_of_tasks(cache),
        )
        points.append(point)
    return Front(setting, length, scores.tasks, scores.apart, points, scores.left_out, scores.begun)


def _dominated(by: str, difference: Estimate) -> Dominated:
    return Dominated(by, difference, difference.low is not None and difference.low > 0)
