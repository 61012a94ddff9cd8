"""Fronts of answers that were made up: what is in a mean, what stands apart, what beats what."""

import json

import pytest

from hf_kvcache.eval.front import fronts
from hf_kvcache.eval.front_report import Report, as_markdown, make_report
from hf_kvcache.eval.gathering import Gathered
from hf_kvcache.eval.intervals import bonett_price
from hf_kvcache.eval.lines import Line

ABOUT = {"model": "toy", "dtype": "bfloat16", "device": "none", "settings": {"seed": 0, "n_questions": 1}}


def answers(cache, scores, nbytes, task="a", setting="known", n_answer=2):
    return [
        Line(task, 128, i, setting, cache, 0, answer="x", n_answer=n_answer, score=score, nbytes=nbytes)
        for i, score in enumerate(scores)
        if score is not None
    ]


def gathered(*groups):
    return Gathered([ABOUT], [line for group in groups for line in group], [])


def of(front, cache):
    (point,) = (point for point in front.points if point.cache == cache)
    return point


def test_a_point_is_beaten_by_what_is_smaller_and_not_worse():
    small, worse = answers("small", [1.0, 1.0, 1.0, 0.0], 25), answers("worse", [1.0, 0.0, 0.0, 0.0], 30)
    (front,) = fronts(gathered(answers("dynamic", [1.0] * 4, 100, n_answer=4), small, worse))
    assert [point.cache for point in front.points] == ["dynamic", "worse", "small"]
    assert of(front, "dynamic").dominated is None and of(front, "dynamic").difference is None
    assert of(front, "small").dominated is None and of(front, "small").behind is None
    found = of(front, "worse")
    assert (found.dominated.by, found.dominated.difference.mean, found.level) == ("small", 0.5, 4)
    assert (found.dominated.difference.low, found.dominated.difference.high) == bonett_price(2, 0, 4)
    assert not found.dominated.is_beyond and found.behind == found.dominated.difference
    assert (found.bytes_ratio, found.n_answer, found.n_answer_dense) == (0.3, 2, 4)


def test_beyond_the_interval():
    (front,) = fronts(
        gathered(*(answers(name, [score] * 40, size) for name, score, size in (("dynamic", 1.0, 9), ("bad", 0.0, 9))))
    )
    assert of(front, "bad").dominated.by == "dynamic" and of(front, "bad").dominated.is_beyond


def test_pairs_are_of_the_instances_that_both_have():
    # where both were asked, the second is better, although its own mean is lower
    one, other = answers("one", [0.0, 0.0, 1.0, 1.0], 25), answers("other", [0.0, 1.0, None, None], 25)
    (front,) = fronts(gathered(answers("dynamic", [1.0] * 4, 100), one, other))
    assert of(front, "one").dominated.by == "other" and of(front, "one").dominated.difference.n == 2
    assert of(front, "other").dominated is None and of(front, "other").n_instances == 2


def test_tasks_that_the_dense_model_cannot_do_stand_apart():
    lines = [
        *answers("dynamic", [1.0, 1.0], 100),
        *answers("dynamic", [0.0, 0.1], 100, task="hard"),
        *answers("quant", [1.0, 0.0], 50),
        *answers("quant", [1.0, 1.0], 50, task="hard"),
    ]
    (front,) = fronts(gathered(lines))
    assert front.tasks == ["a"] and front.apart == {"hard": 0.05}
    assert of(front, "quant").score.mean == 0.5 and of(front, "quant").tasks["hard"].mean == 1
    (front,) = fronts(gathered(lines), least=0.05)
    assert front.tasks == ["a", "hard"] and of(front, "quant").score.mean == 0.75
    with pytest.raises(ValueError, match="no task of which the dense cache has a mean score of 1.5 or more"):
        fronts(gathered(lines), least=1.5)


def test_a_task_that_has_only_begun_is_in_no_mean():
    lines = [line for cache in ("dynamic", "a", "b", "c") for line in answers(cache, [1.0, 1.0], 100)]
    lines += answers("dynamic", [1.0], 100, task="next")
    (front,) = fronts(gathered(lines))
    assert front.tasks == ["a"] and front.begun == ["next"] and not front.left_out
    report = make_report(gathered(lines), [front], 0.1, [])
    assert "fewer than half of the caches have been asked: `next`" in as_markdown(report)
    # once half have been asked, it is the others that are left out
    (front,) = fronts(gathered(lines, answers("a", [1.0], 100, task="next")))
    assert front.tasks == ["a", "next"] and set(front.left_out) == {"b", "c"}


def test_settings_are_never_mixed_and_caches_without_all_tasks_are_named():
    lines = []
    for setting, score in (("known", 1.0), ("unknown", 0.0)):
        for task in "ab":
            lines += answers("dynamic", [1.0, 1.0], 100, task, setting)
            lines += answers("quant", [score, score], 50, task, setting)
    lines += answers("late", [1.0], 50)
    broken = Line("b", 128, 0, "known", "late", 0, error="RuntimeError: no")
    # whatever came first
    known, unknown = fronts(gathered([broken, *reversed(lines)]))
    assert of(known, "quant").score.mean == 1 and of(unknown, "quant").score.mean == 0
    assert known.left_out == {"late": "no scores of b: RuntimeError: no"} and not unknown.left_out


def test_caches_of_another_adapter_are_compared_with_their_own_model():
    lines = [*answers("dynamic", [1.0, 1.0], 100), *answers("dynamic @ x", [0.0, 1.0], 100)]
    lines += [*answers("dms @ x", [0.0, 1.0], 20), *answers("dynamic @ same", [1.0, 1.0], 100)]
    (front,) = fronts(gathered(lines))
    assert of(front, "dms @ x").difference.mean == 0
    assert front.left_out == {"dynamic @ same": "scores as dynamic"}
    assert {point.cache for point in front.points} == {"dynamic", "dynamic @ x", "dms @ x"}


def test_a_report_is_read_back_and_shown():
    found = gathered(answers("dynamic", [1.0] * 4, 100), answers("quant", [1.0, 1.0, 0.0, 0.0], 100))
    report = make_report(found, fronts(found, speeds={"quant": 1.5}), 0.1, ["A note."])
    assert Report.from_dict(json.loads(json.dumps(report.as_dict()))) == report
    table = as_markdown(report)
    assert "A note." in table and "Mean of `a`." in table
    low, high = (f"{100 * end:+.1f}" for end in bonett_price(0, 2, 4))
    assert f"| 1× | `quant` | 1.000 | 50.0 | 15.0 … 85.0 | -50.0 | {low} … {high} | `dynamic`, +50.0, within |" in table
    assert "| 2.0 (2.0) | 1.50× | 4 |" in table
