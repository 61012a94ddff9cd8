"""Questions in one cache, by turn, on texts that all caches were asked."""

import json
import sys
from itertools import product

import pytest

ABOUT = {"model": "toy", "dtype": "bfloat16", "device": "none", "versions": {"transformers": "5.17"}, "commit": "abc"}


@pytest.fixture
def page(monkeypatch, tmp_path, request):
    monkeypatch.syspath_prepend(str(request.config.rootpath / "benchmarks"))
    import turns_table

    monkeypatch.setattr(turns_table, "FILE", tmp_path / "answers.json")
    yield turns_table
    sys.modules.pop("turns_table")


def cell(cache, setting, question, scores, nbytes, task="keys"):
    same = {"task": task, "length": 128, "filled": "replayed", "n_read": 90, "n_asked": 7, "nbytes": nbytes}
    own = {"cache": cache, "setting": setting, "question": question, "scores": scores}
    return same | own | {"instances": list(range(len(scores))), "n_answer": [1] * len(scores)}


def packed(page, cells):
    page.FILE.write_text(json.dumps({"pieces": [ABOUT], "cells": cells}))


def test_a_cache_that_fails_on_its_second_turn(page):
    cells = [cell("dynamic", setting, q, [1.0] * 6, 400) for setting, q in product(("unknown", "turns"), range(2))]
    # two texts fewer than the dense cache; as good as that of copies and on turn 1, then nothing
    cells += [cell("less", "turns", q, [1.0 - q] * 4, 100) for q in (1, 0)]
    cells += [cell("less", "unknown", q, [1.0] * 4, 100) for q in range(2)]
    packed(page, cells)
    head, rule, names, _, dense, less, _, where = page.turns().splitlines()
    assert head == "`keys`, 128 tokens, 4 texts, 2 questions about each." and not rule
    assert names == "| cache | bytes | of copies | turn 1 | turn 2 | all turns | to dense, 95 % |"
    assert dense == "| `dynamic` | 1.000 | 100 | 100 | 100 | 100 | – |"
    # four texts, not eight answers
    assert less.startswith("| `less` | 0.250 | 100 | 100 | 0 | 50 | -50.0 (")
    assert "--questions 2" in where and "--tasks keys" in where and "commit abc" in where


def test_answers_of_two_tasks_are_not_one_table(page):
    packed(page, [cell("dynamic", "turns", 0, [1.0], 1), cell("dynamic", "turns", 0, [1.0], 1, task="values")])
    with pytest.raises(ValueError, match="'values', 128"):
        page.turns()


def test_nothing_is_shown_before_there_is_an_answer(page):
    assert page.turns() == "Not measured yet."
