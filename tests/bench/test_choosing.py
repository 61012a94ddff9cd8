"""The chooser, claims and presses: read off answers that were made up."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hf_kvcache.eval.front import LEAST_DENSE, fronts
from hf_kvcache.eval.front_report import make_report
from hf_kvcache.eval.gathering import Gathered
from hf_kvcache.eval.lines import Line
from hf_kvcache.eval.scores import Scores

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ABOUT = {
    "model": "toy",
    "dtype": "bfloat16",
    "device": "none",
    "threads": 2,
    "commit": "abc",
    "versions": {"torch": "2", "transformers": "5"},
    "settings": {"seed": 0, "n_questions": 1},
}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("choosing", "claims", "evaluate_presses"):
        sys.modules.pop(name, None)


def answers(cache, n_right, nbytes, setting="known", n=40, said="x"):
    found = dict(n_read=10, answer=said, n_answer=1, nbytes=nbytes)
    return [Line("a", 128, i, setting, cache, 0, score=float(i < n_right), **found) for i in range(n)]


@pytest.fixture
def choosing(monkeypatch):
    """The chooser of an evaluation that has no turns, and nothing at 16 times."""
    import choosing

    lines = []
    for setting in ("known", "unknown"):
        lines += answers("dynamic", 40, 1000, setting)
        lines += answers("quant:bits=8", 40, 500, setting) + answers("keydiff:ratio=0.5+quant:bits=4", 39, 300, setting)
        lines += answers("quant:bits=4", 38, 300, setting) + answers("kvpress:snapkv:ratio=0.25", 40, 250, setting)
        lines += answers("snapkv:ratio=0.125", 40 if setting == "known" else 0, 125, setting)
        lines += answers("fp8", 40, 260, setting)
    found = Gathered([ABOUT], lines, [])
    report = make_report(found, fronts(found), LEAST_DENSE, [])
    monkeypatch.setattr(choosing, "evidence", lambda: report)
    return choosing


def test_the_best_of_every_level_and_setting(choosing):
    known, unknown = choosing.by_level("known"), choosing.by_level("unknown")
    assert "128 tokens, 40 instances of every task. Mean of `a`. Dense: 100.0." in known
    # nobody wants a larger cache that is no better
    for level in "248":
        assert f"| {level}× | `kv.KVCache(policy=kv.SnapKV(ratio=0.125))` | 0.125 | 100.0 |" in known
    # another library is no answer, transformers is
    for level in "24":
        assert f"| {level}× | `fp8` (transformers) | 0.260 |" in unknown and "kvpress" not in unknown
    assert "`keydiff:ratio=0.5+quant:bits=4`, `quant:bits=4` |" in unknown
    assert "| 8× | `kv.KVCache(policy=kv.SnapKV(ratio=0.125))` | 0.125 | 100.0 |" in known
    assert "| 8× | `kv.KVCache(policy=kv.SnapKV(ratio=0.125))` | 0.125 | 0.0 |" in unknown
    assert "| 16× | none was measured |" in known


def test_what_was_not_asked_is_said(choosing):
    assert choosing.by_level("turns") == "Not measured yet with the question turns."
    assert choosing.sixteenth().count("none was measured") == 2


def test_nothing_is_lost_in_any_setting(choosing):
    table = choosing.nearly_lossless()
    assert "| at most 1 point by the mean | `fp8` (transformers) | 0.260 |" in table
    assert "with 95 % confidence | none: more instances are needed" in table


def test_key_biases(choosing):
    assert "| unknown | 2× | `kv.QuantCache(bits=8)` |" in choosing.key_biases()
    # neither one scale for all channels nor four bits by token
    assert "| unknown | 4× | `kv.QuantCache(bits=4)` |" in choosing.key_biases()
    bear = {name: choosing.bears_key_biases(name) for name in ("snapkv:ratio=0.5+quant:bits=8", "hqq:bits=4", "dense")}
    assert bear == {"snapkv:ratio=0.5+quant:bits=8": True, "hqq:bits=4": False, "dense": True}
    assert not choosing.bears_key_biases("sparse:sparsity=0.5,bits=4")


def test_the_readme_shows_both_settings(choosing):
    *lines, _, where = choosing.readme().splitlines()[2:]
    assert [line.count("known when") for line in lines] == [1, 1, 1, 0, 0, 0]
    assert where.startswith(
        "128 tokens, 40 instances of each of 1 task; `hf-kvcache report DIR …`, toy, bfloat16, none"
    )
    assert "| 0.12 | 0 of 100 | -100.0 (" in lines[-1]


def test_claims_are_agreed_with_contradicted_or_open():
    from claims import CLAIMS, verdicts

    lines = [*answers("dynamic", 40, 1000, "unknown"), *answers("adakv:ratio=0.25", 40, 250, "unknown")]
    lines += answers("snapkv:ratio=0.25", 5, 250, "unknown") + answers("keydiff:ratio=0.25", 0, 250, "unknown")
    lines += answers("quant:bits=4", 40, 250, "unknown") + answers("locret:ratio=0.25 @ heads", 30, 250, "unknown")
    known = [*answers("dynamic", 40, 1000), *answers("snapkv:ratio=0.25", 30, 250)]
    scores = {("unknown", 128): Scores(lines, 1, LEAST_DENSE), ("known", 128): Scores(known, 1, LEAST_DENSE)}
    found = {(row.better, row.worse, row.setting): row for row in verdicts(scores)}
    assert found["adakv:ratio=0.25", "snapkv:ratio=0.25", "unknown"].verdict == "agrees"
    assert found["keydiff:ratio=0.25", "snapkv:ratio=0.25", "unknown"].verdict == "contradicts"
    # 40 of 40 in both says no more than that up to some 5 points may be lost
    assert found["quant:bits=4", "dynamic", "unknown"].verdict == "not decided"
    assert found["snapkv:ratio=0.25", "snapkv:ratio=0.25", "known > unknown"].verdict == "agrees"
    assert found["locret:ratio=0.25", "snapkv:ratio=0.25", "unknown"].verdict == "agrees"
    assert found["kvzip:ratio={r}", "snapkv:ratio={r}", "unknown"].verdict == "not measured"
    assert {(claim.setting) for claim in CLAIMS} == {"known", "unknown", "known > unknown"}


def test_claims_are_judged_by_tasks_that_both_were_asked():
    """Half of the tasks at the same score is no difference, whatever a task does that one of them was not asked."""
    from claims import verdicts

    lines = [*answers("dynamic", 40, 1000, "unknown"), *answers("kvzip:ratio=0.25", 40, 250, "unknown")]
    lines += answers("snapkv:ratio=0.25", 5, 250, "unknown")
    more = [*answers("dynamic", 40, 1000, "unknown"), *answers("snapkv:ratio=0.25", 40, 250, "unknown")]
    lines += [replace(line, task="b") for line in more]
    scores = {("unknown", 128): Scores(lines, 1, LEAST_DENSE)}
    (found,) = (row for row in verdicts(scores) if (row.better, row.worse[:6]) == ("kvzip:ratio=0.25", "snapkv"))
    assert found.verdict == "agrees" and found.difference.mean == 35 / 40


def test_presses_are_compared_answer_by_answer():
    from evaluate_presses import PAIRS, compare

    alike, default = (text.format(r=0.25) for text in PAIRS["keydiff"])
    press = answers("kvpress:keydiff:ratio=0.25", 20, 250)
    ours, defaults = answers(alike, 20, 250), answers(default, 30, 260, said="y")
    (row,) = compare(press, ours, defaults, 0.25)
    assert compare(press, ours, [], 0.25)[0]["default score"] is None
    assert (row["press"], row["setting"], row["n"], row["same answers"]) == ("keydiff", "known", 40, 1.0)
    assert (row["kvpress score"], row["score"], row["default score"], row["ours"]) == (0.5, 0.5, 0.75, alike)
    assert row["difference"][0] == 0 and row["bytes per token"] == [25.0, 25.0, 26.0]


def test_once_evicts_from_what_comes_first_alone():
    from evaluate_presses import once

    from hf_kvcache.policies.keydiff import KeyDiff

    policy = once(KeyDiff)(ratio=0.25)
    assert policy.should_evict(400, 400, False, 400) and not policy.should_evict(130, 430, False, 30)
    assert KeyDiff(ratio=0.25).should_evict(130, 430, False, 30)


@pytest.mark.parametrize("ratio", (0.25, 0.5))
def test_our_sides_of_the_pairs_can_be_built(ratio):
    from evaluate_presses import PAIRS

    from hf_kvcache.eval.specs import parse

    for text in {text for pair in PAIRS.values() for text in pair}:
        parse(text.format(r=ratio)).check()
