"""Answers of one setting and length as scores, which can be compared instance by instance."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from statistics import fmean

from hf_kvcache.eval.gathering import baseline_of
from hf_kvcache.eval.intervals import Estimate, difference_of, mean_of, mean_of_means
from hf_kvcache.eval.lines import Line


class Scores:
    """Scores by cache, task and instance. Means are of the tasks that the dense model can do.

    Args:
        lines: of one setting and length.
        n_questions: about every text.
        least: mean score of the dense cache below which a task stands apart.

    Attributes:
        caches: in the order in which they come first.
        dense: the dense cache, None where there are no answers of it.
        tasks: that it can do.
        apart: those that it cannot do, with its score.
        begun: tasks that fewer than half of the caches have been asked: a run that goes on has come no further.
    """

    def __init__(self, lines: list[Line], n_questions: int, least: float):
        self.lines: dict[tuple[str, str], list[Line]] = defaultdict(list)
        for line in lines:
            self.lines[line.cache, line.task].append(line)
        self.caches = list(dict.fromkeys(line.cache for line in lines))
        every = list(dict.fromkeys(line.task for line in lines))
        self._of = {key: by_instance(found, n_questions) for key, found in self.lines.items()}
        self.dense = next((cache for cache in self.caches if cache == baseline_of(cache)), None)
        dense = {task: fmean(found.values()) for task in every if (found := self.of(self.dense, task))}
        asked = {task: sum((cache, task) in self.lines for cache in self.caches) for task in dense}
        self.begun = [task for task, n in asked.items() if 2 * n < len(self.caches)]
        self.tasks = [task for task, score in dense.items() if score >= least and task not in self.begun]
        self.apart = {task: score for task, score in dense.items() if score < least and task not in self.begun}

    def of(self, cache: str | None, task: str) -> dict[int, float]:
        """Score of every instance."""
        return self._of.get((cache, task), {})

    def score(self, cache: str) -> Estimate:
        """Mean of tasks of a cache that is not left out."""
        return mean_of_means([mean_of(list(self.of(cache, task).values())) for task in self.tasks])

    def scores_of_tasks(self, cache: str) -> dict[str, Estimate]:
        """Of every task with answers, those that stand apart included."""
        found = {task: list(self.of(cache, task).values()) for task in (*self.tasks, *self.apart)}
        return {task: mean_of(scores) for task, scores in found.items() if scores}

    def gain(self, a: str, b: str) -> float | None:
        """Mean score of `a` minus that of `b` on the instances that both have; None where a task has none."""
        pairs = self._pairs(a, b)
        return None if pairs is None else fmean(fmean(one) - fmean(other) for one, other in pairs)

    def difference(self, a: str, b: str) -> Estimate | None:
        """The same with its interval."""
        pairs = self._pairs(a, b)
        return None if pairs is None else mean_of_means([difference_of(one, other) for one, other in pairs])

    def n_instances(self, cache: str) -> int:
        """Of the task that has fewest."""
        return min(len(self.of(cache, task)) for task in self.tasks)

    def n_failed(self, cache: str) -> int:
        """Questions that ended in an error."""
        return sum(line.error is not None for task in self.tasks for line in self.lines.get((cache, task), ()))

    def bytes_ratio(self, cache: str) -> float:
        """Mean bytes as a share of the dense cache's."""
        return self._mean_of_pairs(cache, lambda own, dense: own.nbytes / dense.nbytes)

    def n_answer(self, cache: str) -> tuple[float, float]:
        """Mean tokens of an answer, and of the dense cache's to the same questions."""
        own = self._mean_of_pairs(cache, lambda own, dense: own.n_answer)
        return own, self._mean_of_pairs(cache, lambda own, dense: dense.n_answer)

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Caches that no mean can be made of, and why."""
        found = {}
        for cache in self.caches:
            missing = [task for task in self.tasks if not self.of(cache, task)]
            if missing:
                errors = [line.error for task in missing for line in self.lines.get((cache, task), ()) if line.error]
                found[cache] = f"no scores of {', '.join(missing)}" + (f": {errors[0]}" if errors else "")
            elif self._pairs(cache, baseline_of(cache)) is None:
                found[cache] = f"{baseline_of(cache)} has not been asked the same"
            elif cache != self.dense and cache == baseline_of(cache) and self.gain(cache, self.dense) == 0:
                found[cache] = f"scores as {self.dense}"
        return found

    def _pairs(self, a: str, b: str) -> list[tuple[list[float], list[float]]] | None:
        pairs = []
        for task in self.tasks:
            one, other = self.of(a, task), self.of(b, task)
            both = [i for i in one if i in other]
            pairs.append(([one[i] for i in both], [other[i] for i in both]))
        return pairs if pairs and all(one for one, _ in pairs) else None

    def _mean_of_pairs(self, cache: str, measure) -> float:
        """Mean of tasks of `measure(line, line of the dense cache)` over answers to the same questions."""
        found = []
        for task in self.tasks:
            dense = {(line.instance, line.question): line for line in self.lines[baseline_of(cache), task]}
            pairs = [(line, dense.get((line.instance, line.question))) for line in self.lines[cache, task]]
            found.append(fmean(measure(a, b) for a, b in pairs if b and a.error is None and b.error is None))
        return fmean(found)


def by_instance(lines: list[Line], n_questions: int) -> dict[int, float]:
    """The score of every instance all questions of which are answered."""
    found: dict[int, list[float]] = defaultdict(list)
    for line in lines:
        if line.error is None:
            found[line.instance].append(line.score)
    return {i: fmean(answers) for i, answers in found.items() if len(answers) == n_questions}
