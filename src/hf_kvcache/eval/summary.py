"""What an evaluation has found: scores by task, length, setting and cache, with intervals, and what they cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from hf_kvcache.eval.intervals import Estimate, difference_of, mean_of, mean_of_means
from hf_kvcache.eval.lines import Line

BASELINE = "dynamic"
MEAN = "mean of tasks"


@dataclass(frozen=True)
class Summary:
    """One cache in one setting. Instances are independent, questions about one are not: their mean is its score.

    Attributes:
        task, length, setting, cache: as in `Line`; `MEAN` for the mean of all tasks.
        n_instances: that are answered as a whole.
        n_failed: questions that ended in an error.
        score: mean over instances.
        difference: to the baseline, on the instances that both have answered; None for the baseline itself.
        n_answer: mean tokens of an answer.
        bytes_ratio: mean bytes of the cache as a share of the baseline's, once both had compressed what they had read.
        n_replayed: answers from caches that were filled from a dense prefill.
    """

    task: str
    length: int
    setting: str
    cache: str
    n_instances: int
    n_failed: int
    score: Estimate | None
    difference: Estimate | None
    n_answer: float | None
    bytes_ratio: float | None
    n_replayed: int


def summarise(lines: Iterable[Line], n_questions: int) -> list[Summary]:
    """Of every task, length, setting and cache, in the order in which they come first; means of tasks at the end.

    Args:
        lines: of one evaluation.
        n_questions: about every instance.
    """
    groups: dict[tuple, list[Line]] = defaultdict(list)
    for line in lines:
        groups[line.setting, line.length, line.task, line.cache].append(line)
    scores = {key: _scores(found, n_questions) for key, found in groups.items()}
    rows = {key: _row(key, found, scores, groups) for key, found in groups.items()}
    # by setting and length, which are never mixed
    order = {key[:2]: i for i, key in reversed(list(enumerate(groups)))}
    tasks = {key[2]: i for i, key in reversed(list(enumerate(groups)))}
    ordered = sorted(groups, key=lambda key: (order[key[:2]], tasks[key[2]]))
    means = _means([rows[key] for key in ordered]) if len(tasks) > 1 else []
    return [rows[key] for key in ordered] + means


def _scores(lines: list[Line], n_questions: int) -> dict[int, float]:
    """The score of every instance all questions of which are answered."""
    found: dict[int, list[float]] = defaultdict(list)
    for line in lines:
        if line.error is None:
            found[line.instance].append(line.score)
    return {i: fmean(answers) for i, answers in found.items() if len(answers) == n_questions}


def _row(key: tuple, lines: list[Line], scores: dict, groups: dict) -> Summary:
    setting, length, task, cache = key
    ours, base = _pairs(key, scores)
    dense = {(line.instance, line.question): line.nbytes for line in groups.get((*key[:3], BASELINE), ())}
    answered = [line for line in lines if line.error is None]
    shares = [line.nbytes / n for line in answered if (n := dense.get((line.instance, line.question)))]
    return Summary(
        task,
        length,
        setting,
        cache,
        n_instances=len(scores[key]),
        n_failed=len(lines) - len(answered),
        score=mean_of(list(scores[key].values())) if scores[key] else None,
        difference=difference_of(ours, base) if ours and cache != BASELINE else None,
        n_answer=fmean(line.n_answer for line in answered) if answered else None,
        bytes_ratio=fmean(shares) if shares else None,
        n_replayed=sum(line.filled == "replayed" for line in answered),
    )


def _pairs(key: tuple, scores: dict) -> tuple[list[float], list[float]]:
    """Scores of a cache and of the baseline on the instances that both have answered."""
    ours, base = scores[key], scores.get((*key[:3], BASELINE), {})
    both = [i for i in ours if i in base]
    return [ours[i] for i in both], [base[i] for i in both]


def _means(rows: list[Summary]) -> list[Summary]:
    """Means of tasks, of caches that have scores of all."""
    by_cache: dict[tuple, list[Summary]] = defaultdict(list)
    tasks_of: dict[tuple, set[str]] = defaultdict(set)
    for row in rows:
        by_cache[row.setting, row.length, row.cache].append(row)
        tasks_of[row.setting, row.length].add(row.task)
    found = []
    for (setting, length, cache), of_tasks in by_cache.items():
        if len(of_tasks) < len(tasks_of[setting, length]) or any(row.score is None for row in of_tasks):
            continue
        gains = [row.difference for row in of_tasks]
        ratios = [row.bytes_ratio for row in of_tasks]
        row = Summary(
            MEAN,
            length,
            setting,
            cache,
            n_instances=min(row.n_instances for row in of_tasks),
            n_failed=sum(row.n_failed for row in of_tasks),
            score=mean_of_means([row.score for row in of_tasks]),
            difference=None if None in gains else mean_of_means(gains),
            n_answer=fmean(row.n_answer for row in of_tasks),
            bytes_ratio=None if None in ratios else fmean(ratios),
            n_replayed=sum(row.n_replayed for row in of_tasks),
        )
        found.append(row)
    return found
