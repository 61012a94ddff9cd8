"""Summaries of lines that were made up, and tables of them."""

import pytest
from rich.console import Console

from hf_kvcache.eval.intervals import bonett_price, wilson
from hf_kvcache.eval.lines import Line
from hf_kvcache.eval.summary import MEAN, summarise
from hf_kvcache.eval.tables import COLUMNS, as_markdown, as_tables


def line(cache, instance, score, question=0, task="a", setting="known", nbytes=50, **changed):
    found = dict(answer="x", n_answer=2, score=score, nbytes=nbytes, filled="replayed") | changed
    return Line(task, 128, instance, setting, cache, question, **found)


def of(rows, **wanted):
    (row,) = (row for row in rows if all(getattr(row, name) == value for name, value in wanted.items()))
    return row


def test_scores_are_paired_by_instance():
    lines = [line("dynamic", i, i > 0, nbytes=100, n_answer=4) for i in range(4)]
    # the second instance is missing, the fifth is not in the baseline
    lines += [line("quant", i, score) for i, score in ((0, 1.0), (2, 0.0), (3, 1.0), (4, 1.0))]
    row = of(summarise(lines, 1), cache="quant")
    assert row.score.mean == 0.75 and (row.score.low, row.score.high) == wilson(3, 4) and row.n_instances == 4
    assert row.difference.mean == 0 and row.difference.n == 3
    assert (row.difference.low, row.difference.high) == bonett_price(1, 1, 3)
    assert row.bytes_ratio == 0.5 and row.n_answer == 2 and row.n_replayed == 4
    base = of(summarise(lines, 1), cache="dynamic")
    assert base.difference is None and base.bytes_ratio == 1 and base.n_answer == 4


def test_several_questions_are_one_instance():
    lines = [line("dynamic", i, (i + q) % 2, q) for i in range(3) for q in range(2)]
    # one of two is missing, so that there is no score of this instance
    lines.append(line("dynamic", 3, 1.0, 0))
    row = of(summarise(lines, 2), cache="dynamic")
    assert (row.score.mean, row.score.kind, row.score.n, row.n_instances) == (0.5, "wilson", 3, 3)


def test_failures_are_counted_and_not_scored():
    lines = [line("dynamic", 0, 1.0), line("quant", 0, None, error="OutOfMemoryError: no", answer=None, nbytes=None)]
    row = of(summarise(lines, 1), cache="quant")
    assert (row.n_failed, row.n_instances, row.score, row.difference, row.bytes_ratio) == (1, 0, None, None, None)
    assert "| a | quant | – | – | – | – | – | – | 0 + 1 |" in as_markdown(summarise(lines, 1), "title")


def test_settings_are_never_mixed_and_tasks_count_alike():
    lines = [
        line(cache, i, float(score), task=task, setting=setting)
        for setting, cache, task, scores in (
            ("known", "dynamic", "a", (1, 1, 1, 1)),
            ("known", "dynamic", "b", (1, 0)),
            ("known", "quant", "a", (1, 0, 1, 0)),
            ("known", "quant", "b", (0, 0)),
            ("unknown", "dynamic", "a", (0, 0)),
            ("unknown", "dynamic", "b", (0, 0)),
            # of one task only
            ("unknown", "quant", "a", (0, 0)),
        )
        for i, score in enumerate(scores)
    ]
    rows = summarise(lines, 1)
    known = of(rows, task=MEAN, setting="known", cache="quant")
    assert known.score.mean == 0.25 and known.difference.mean == pytest.approx(-0.5) and known.n_instances == 2
    assert of(rows, task=MEAN, setting="unknown").score.mean == 0
    text = as_markdown(rows, "title")
    assert text.startswith("# title\n") and text.count("## ") == 2
    first, second = text.index("## known, 128 tokens"), text.index("## unknown, 128 tokens")
    assert first < text.index("| mean of tasks | quant | 1.000 | 25.0 |") < second
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {len(COLUMNS) + 1}
    console = Console(width=140, record=True, file=open("/dev/null", "w"))
    console.print(*as_tables(rows))
    shown = console.export_text()
    assert shown.count("mean of tasks") == 3 and "-50.0" in shown
