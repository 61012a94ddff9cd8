"""Answers packed for the repository, and a run that goes on from them."""

import json
import sys
from itertools import product
from pathlib import Path

import pytest

from hf_kvcache.eval.lines import Line, Lines
from hf_kvcache.eval.summary import summarise

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cells  # noqa: E402

ABOUT = {"model": "small", "dtype": "float32", "settings": {"seed": 0}, "adapter": None, "date": "today"}


def answered():
    lines = Lines(None, ABOUT)
    for cache, nbytes in (("dynamic", 100), ("snapkv:ratio=0.5", 52)):
        for setting in ("known", "unknown"):
            for i in range(5):
                known = dict(n_read=90, n_asked=7, n_answer=i + 1, answer="a word", nbytes=nbytes, filled="replayed")
                score = float(cache == "dynamic" or (setting == "known" and i < 3))
                lines.add(Line("colours", 128, i, setting, cache, 0, score=score, **known))
    lines.add(Line("colours", 128, 5, "known", "dynamic", 0, error="Killed: no memory"))
    return lines


def test_what_is_packed_says_the_same(tmp_path):
    path, lines, back = tmp_path / "packed.json", answered(), Lines(None, ABOUT)
    path.write_text(json.dumps(cells.pack(lines, [ABOUT])))
    assert cells.unpack_into(back, path) == [ABOUT] and len(back) == 20
    whole = [line for line in lines if line.error is None]
    assert summarise(back, 1) == summarise(whole, 1)
    # what is there already stays
    assert cells.unpack_into(lines, path) == [ABOUT] and [line.answer for line in lines][:2] == ["a word"] * 2
    assert len(json.dumps(cells.pack(lines, []))) < 1500


def test_questions_about_one_text_stay_apart(tmp_path):
    path, lines, back = tmp_path / "packed.json", Lines(None, ABOUT), Lines(None, ABOUT)
    known = dict(n_read=90, n_answer=3, answer="a word", nbytes=100, filled="replayed")
    for i, q in product(range(3), range(4)):
        lines.add(Line("colours", 128, i, "turns", "dynamic", q, score=float(q < 2), n_asked=7 * (q + 1), **known))
    path.write_text(json.dumps(cells.pack(lines, [ABOUT])))
    cells.unpack_into(back, path)
    assert {line.key: (line.score, line.n_asked) for line in back} == {
        line.key: (line.score, line.n_asked) for line in lines
    }


def test_files_that_do_not_name_the_question_have_one(tmp_path):
    path, back, packed = tmp_path / "packed.json", Lines(None, ABOUT), cells.pack(answered(), [ABOUT])
    for cell in packed["cells"]:
        del cell["question"]
    path.write_text(json.dumps(packed))
    cells.unpack_into(back, path)
    assert [line.key for line in back] == [line.key for line in answered() if line.error is None]


@pytest.mark.parametrize("name, value", [("model", "large"), ("dtype", "bfloat16"), ("settings", {"seed": 1})])
def test_answers_of_another_run_are_refused(tmp_path, name, value):
    path = tmp_path / "packed.json"
    path.write_text(json.dumps(cells.pack(answered(), [ABOUT | {name: value}])))
    lines = Lines(None, ABOUT)
    with pytest.raises(ValueError, match=f"is of {name}"):
        cells.unpack_into(lines, path)
    assert not len(lines)
