"""What was measured, held against limits: passed, failed or undecided, and what would decide it."""

import pytest

from hf_kvcache.eval.checking import Deviation, Found, Piece
from hf_kvcache.eval.intervals import Estimate, difference_of
from hf_kvcache.eval.verdicts import FAILED, PASSED, UNDECIDED, Limits, held_against, judge, overall, texts_needed

NOT_FINITE = Deviation(None, None, 3.0, 0.0, False)


def piece(kl=0.001, repeats=None, dense_repeats=None, nbytes=25):
    """A piece of prose that loses `kl`."""
    agreed = None if repeats is None else 3
    return Piece(Deviation(kl, 3.0 + kl, 3.0, 0.9, True), repeats, dense_repeats, agreed, nbytes, 100, nbytes, 100)


def text(score, dense_score, n=2):
    """A text with needles."""
    return Found(Deviation(0.1, 1.1, 1.0, 0.9, True), score, dense_score, n)


def verdicts_on(pieces, found=(), **limits):
    """Verdicts by name."""
    return {one.name: one for one in judge(pieces, found, Limits(**limits))}


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.0, 0.05, PASSED),
        (0.01, 0.051, UNDECIDED),
        (0.05, 0.2, UNDECIDED),
        (0.051, 0.2, FAILED),
        (None, None, UNDECIDED),
    ],
)
def test_where_an_interval_lies(low, high, verdict):
    assert held_against(Estimate(0.05, low, high, "bootstrap", 8), 0.05) == verdict


def test_how_many_texts_would_decide():
    assert texts_needed(Estimate(0.03, 0.0, 0.07, "bootstrap", 8), 0.05) == 32
    assert texts_needed(Estimate(0.07, 0.03, 0.1, "bootstrap", 8), 0.05) == 32
    assert texts_needed(Estimate(0.05, 0.0, 0.1, "bootstrap", 8), 0.05) is None
    assert texts_needed(Estimate(0.0499, 0.0, 0.1, "bootstrap", 8), 0.05) is None
    assert texts_needed(Estimate(0.03, None, None, "none", 1), 0.05) == 4


def test_so_many_needles_do_decide_where_none_is_lost():
    n = texts_needed(difference_of([1.0] * 4, [1.0] * 4), 0.1)
    high = {m: difference_of([1.0] * m, [1.0] * m).high for m in (n - 1, n)}
    assert high[n] <= 0.1 < high[n - 1]


def test_prose_is_judged_by_its_interval():
    assert verdicts_on([piece(0.01), piece(0.02)])["prose"].verdict == PASSED
    lost = verdicts_on([piece(0.2), piece(0.3)])["prose"]
    assert lost.verdict == FAILED and not lost.todo and "KL 0.2500 (0.2000 to 0.3000)" in lost.says
    assert lost.measured["perplexity"] > lost.measured["dense_perplexity"]
    both = verdicts_on([piece(0.01), piece(0.08)])["prose"]
    assert both.verdict == UNDECIDED and "--pieces" in both.todo
    assert verdicts_on([piece(0.01), piece(0.08)], kl=0.1)["prose"].verdict == PASSED
    one = verdicts_on([piece(0.0)])["prose"]
    assert one.verdict == UNDECIDED and "one text" in one.says


def test_needles_are_paired_with_the_dense_model():
    pieces = [piece(), piece()]
    assert verdicts_on(pieces, [text(1.0, 1.0)] * 26)["needles"].verdict == PASSED
    few = verdicts_on(pieces, [text(1.0, 1.0)] * 4)["needles"]
    assert few.verdict == UNDECIDED and "--needles 26" in few.todo
    lost = verdicts_on(pieces, [text(0.0, 1.0)] * 8 + [text(0.5, 0.5)])["needles"]
    assert lost.verdict == FAILED and "1 of 18 found, dense 17" in lost.says
    assert lost.measured["found"] == 1 and lost.measured["dense_found"] == 17
    # what the cache finds and the dense model does not makes good for what it loses
    assert verdicts_on(pieces, [text(0.0, 1.0), text(1.0, 0.0)] * 8)["needles"].verdict == UNDECIDED
    assert "needles" not in verdicts_on(pieces)


def test_a_dense_model_that_finds_nothing_says_nothing():
    verdict = verdicts_on([piece(), piece()], [text(0.0, 0.0)] * 40)["needles"]
    assert verdict.verdict == UNDECIDED and verdict.says.startswith("your dense model finds 0 of 80: this says nothing")
    # unless what little it finds is plainly lost
    assert verdicts_on([piece()], [text(0.0, 0.4)] * 40)["needles"].verdict == FAILED


def test_repeating_oneself_is_judged_where_the_model_was_let_go_on():
    pieces = [piece(repeats=0.9, dense_repeats=0.1), piece(repeats=0.8, dense_repeats=0.2)]
    assert verdicts_on(pieces)["decode"].verdict == FAILED
    assert verdicts_on([piece(repeats=0.2, dense_repeats=0.2)] * 40)["decode"].verdict == PASSED
    dense = verdicts_on([piece(repeats=0.9, dense_repeats=0.9)] * 40)["decode"]
    assert dense.verdict == UNDECIDED and "your dense model repeats itself" in dense.says
    assert "decode" not in verdicts_on([piece()])


def test_bytes_are_told_and_judged_where_asked_for():
    assert verdicts_on([piece()])["bytes"].verdict is None
    assert verdicts_on([piece()], bytes_ratio=0.25)["bytes"].verdict == PASSED
    assert verdicts_on([piece()], bytes_ratio=0.2)["bytes"].verdict == FAILED


def test_numbers_that_are_none_fail_by_themselves():
    broken = Piece(NOT_FINITE, None, None, None, 25, 100, 25, 100)
    verdicts = verdicts_on([piece(0.0), piece(0.0), broken])
    assert verdicts["numbers"].verdict == FAILED and "on 1 of 3 texts" in verdicts["numbers"].says
    assert verdicts["prose"].verdict == PASSED and verdicts["prose"].estimate.n == 2
    assert verdicts_on([broken])["prose"].verdict == FAILED
    found = Found(NOT_FINITE, 0.0, 1.0, 2)
    assert verdicts_on([piece(), piece()], [found] * 8)["numbers"].verdict == FAILED


def test_the_worst_verdict_is_that_of_all():
    def of(*verdicts):
        return overall([judge([piece()], [], Limits())[-1].__class__("x", verdict, "") for verdict in verdicts])

    assert of(PASSED, None) == PASSED and of(PASSED, UNDECIDED) == UNDECIDED and of(UNDECIDED, FAILED) == FAILED
