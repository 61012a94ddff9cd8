"""Going on with texts through compressed caches: loss and KL by position, and that a killed run goes on."""

import json
import math
from dataclasses import replace

import pytest
import torch
from toy_tasks import small_model

import hf_kvcache as kv
from hf_kvcache.eval import continuing
from hf_kvcache.eval.continuing import Continued, ContinuedLines, TextPlan, go_on
from hf_kvcache.eval.fidelity import dense_logits, fidelity
from hf_kvcache.eval.intervals import bootstrapped
from hf_kvcache.eval.lines import OtherRun
from hf_kvcache.eval.position_tables import as_markdown, as_tables
from hf_kvcache.eval.positions import bins, by_position
from hf_kvcache.eval.running import Settings
from hf_kvcache.eval.specs import parse
from hf_kvcache.eval.windows import Windows, in_steps
from hf_kvcache.models import embedded_prose

SPECS = tuple(map(parse, ("dynamic", "dense", "quant:bits=2,window=0", "streaming:budget=24,n_recent=8")))
PLAN = TextPlan((64, 96), 20, 2, SPECS)
ABOUT = {"model": "small", "texts": {"sha256": "x"}}


@pytest.fixture(scope="module")
def small():
    return small_model()


@pytest.fixture(scope="module")
def texts(small):
    prose = embedded_prose().read_text(encoding="utf-8")
    return Windows(small[1], (prose[:4000], prose[4000:6000]))


@pytest.fixture(scope="module")
def scored(small, texts):
    lines = ContinuedLines(None, ABOUT)
    go_on(small[0], texts, PLAN, Settings(), lines)
    return lines


def by_key(lines):
    return {line.key: line for line in lines}


# -- windows ---------------------------------------------------------------------------------------------------------


class Letters:
    """Every character is a token."""

    def __init__(self, bos=None):
        self.bos_token_id = bos

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize("bos", [None, 7])
def test_windows_do_not_overlap_and_come_from_all_texts(bos):
    texts = Windows(Letters(bos), ("".join(map(chr, range(200, 261))), "".join(map(chr, range(500, 525)))))
    windows = [texts.window(i, 10) for i in range(len(texts.places(10)))]
    size = 10 if bos is None else 9
    assert len(windows) == 61 // size + 25 // size and all(len(window) == 10 for window in windows)
    assert all(window[0] == bos for window in windows if bos)
    read = [token for window in windows for token in window if token != bos]
    assert len(read) == len(set(read))
    # the first of both, the second of both, then what the longer one has left
    assert [window[-1] >= 500 for window in windows[:4]] == [False, True, False, True]
    again = Windows(texts.tokenizer, texts.texts, 1)
    assert windows != [again.window(i, 10) for i in range(len(windows))]
    assert texts.about() == again.about() != Windows(texts.tokenizer, texts.texts[:1]).about()


def test_every_token_that_follows_is_predicted_once():
    steps = list(in_steps(torch.arange(30)[None], 10, 8))
    assert [fed.tolist() for fed, _ in steps] == [[[*range(10, 18)]], [[*range(18, 26)]], [[*range(26, 29)]]]
    assert torch.equal(torch.cat([targets for _, targets in steps], 1)[0], torch.arange(11, 30))


# -- scores ----------------------------------------------------------------------------------------------------------


def test_every_text_has_a_line(scored):
    assert len(scored) == PLAN.n_lines == 16
    for line in scored:
        assert line.error is None and len(line.loss) == len(line.kl) == 20
        dense = by_key(scored)[line.length, line.text, "dynamic"]
        if line.cache == "dense":
            # the same rows in the same form
            assert line.loss == pytest.approx(dense.loss, abs=1e-4) and max(line.kl) < 1e-5
            assert line.nbytes == dense.nbytes and line.filled == "replayed"
    assert all(max(line.kl) == 0 for line in scored if line.cache == "dynamic")
    worse = [line for line in scored if line.cache.startswith(("quant", "streaming"))]
    assert all(sum(line.kl) > 1e-3 and min(line.kl) >= 0 for line in worse)


def test_scores_are_those_of_fidelity(small, texts, scored):
    """A window by window comparison with the measure that `compare` reports."""
    model = small[0]
    for length in PLAN.lengths:
        window = torch.tensor([texts.window(1, PLAN.n_tokens(length))])
        for spec in SPECS[1:]:
            expected = fidelity(
                model, window, length, dense_logits(model, window, length), lambda spec=spec: spec.build(model.config)
            )
            line = by_key(scored)[length, 1, spec.text]
            assert math.exp(sum(line.loss) / 20) == pytest.approx(expected.perplexity, rel=1e-3)
            assert sum(line.kl) / 20 == pytest.approx(expected.kl, rel=1e-2, abs=1e-6)


def test_replayed_and_read_caches_are_scored_alike(small, texts, scored):
    lines = ContinuedLines(None, ABOUT)
    go_on(small[0], texts, PLAN, replace(Settings(), replays=False), lines)
    for key, line in by_key(lines).items():
        assert line.filled == "direct" and by_key(scored)[key].filled == "replayed"
        assert line.loss == pytest.approx(by_key(scored)[key].loss, abs=2e-3)
        assert line.nbytes == by_key(scored)[key].nbytes


def test_texts_that_are_read_together_are_scored_as_each_alone(small, texts, scored):
    lines = ContinuedLines(None, ABOUT)
    go_on(small[0], texts, replace(PLAN, batch_size=2), Settings(), lines)
    assert by_key(lines).keys() == by_key(scored).keys()
    for key, line in by_key(lines).items():
        alone = by_key(scored)[key]
        assert line.loss == pytest.approx(alone.loss, abs=2e-3) and line.nbytes == alone.nbytes, key
    # of two texts one is missing
    left = ContinuedLines(None, ABOUT)
    for line in lines:
        if line.text == 0:
            left.add(line)
    go_on(small[0], texts, replace(PLAN, batch_size=2), Settings(), left)
    assert by_key(left) == by_key(lines)


def test_a_killed_run_goes_on_with_texts(small, texts, scored, tmp_path, monkeypatch):
    path, kept = tmp_path / "texts.jsonl", []
    lines = ContinuedLines(path, ABOUT)

    def killed(line):
        if len(lines) == 6:
            raise KeyboardInterrupt
        ContinuedLines.add(lines, line)

    monkeypatch.setattr(lines, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        go_on(small[0], texts, PLAN, Settings(), lines)
    on, advanced = ContinuedLines(path, ABOUT), []
    monkeypatch.setattr(on, "add", lambda line: (kept.append(line.key), ContinuedLines.add(on, line)))
    go_on(small[0], texts, PLAN, Settings(), on, lambda stage, n: advanced.append(n))
    # the dense cache of the text in question was scored again, and not written again
    assert len(kept) == 10 and sum(advanced) == 16 and by_key(on) == by_key(scored)
    monkeypatch.setattr(continuing, "Reading", lambda *args: pytest.fail("a text was read"))
    go_on(small[0], texts, PLAN, Settings(), ContinuedLines(path, ABOUT))
    assert len(path.read_text().splitlines()) == 17 and json.loads(path.read_text().splitlines()[0]) == ABOUT
    with pytest.raises(OtherRun, match="texts.sha256 was 'x', now it is 'y'"):
        ContinuedLines(path, ABOUT | {"texts": {"sha256": "y"}})


def test_one_cache_that_fails_is_one_line(small, texts, monkeypatch):
    monkeypatch.setattr(kv.QuantCache, "update", lambda *args, **kwargs: 1 / 0)
    lines = ContinuedLines(None, ABOUT)
    go_on(small[0], texts, replace(PLAN, n_texts=1), Settings(), lines)
    assert {line.cache for line in lines if line.error} == {SPECS[2].text} and len(lines) == 8
    assert [row.n_failed for row in by_position(lines, 20) if row.cache == SPECS[2].text] == [1, 1, 1] * 2
    # without the dense cache there is nothing to compare with
    monkeypatch.setattr(continuing._Together, "_predictions", lambda *args: 1 / 0)
    lines = ContinuedLines(None, ABOUT)
    go_on(small[0], texts, replace(PLAN, n_texts=1, lengths=(64,)), Settings(), lines)
    assert {line.error for line in lines if line.cache == "dense"} == {
        "RuntimeError: the baseline failed: ZeroDivisionError: division by zero"
    }


# -- summaries -------------------------------------------------------------------------------------------------------


def made_up():
    """Losses of three texts: the cache loses 1 nat in the first 16 positions, and 3 in the last 4."""
    lines = []
    for i, base in enumerate((1.0, 2.0, 6.0)):
        lines.append(Continued(100, i, "dynamic", [base] * 20, [0.0] * 20, 100, "replayed"))
        if i < 2:
            lost = [1.0] * 16 + [3.0] * 4
            lines.append(Continued(100, i, "quant", [base + x for x in lost], [x / 2 for x in lost], 25, "replayed"))
    lines.append(Continued(100, 2, "quant", error="OutOfMemoryError: no"))
    return lines


def test_bins_end_where_they_should():
    assert bins(16) == [(1, 16)] and bins(20) == [(1, 20), (1, 16), (17, 20)]
    assert bins(256) == [(1, 256), (1, 16), (17, 64), (65, 256)]


def test_losses_are_paired_by_text_and_position():
    rows = {(row.cache, row.first, row.last): row for row in by_position(made_up(), 20)}
    assert len(rows) == 6
    assert rows["quant", 1, 16].loss.mean == 1 and rows["quant", 17, 20].loss.mean == 3
    whole = rows["quant", 1, 20]
    # of the two texts that both have: (16 * 1 + 4 * 3) / 20
    assert whole.loss.mean == pytest.approx(1.4) and whole.kl.mean == pytest.approx(0.7)
    assert whole.loss.low == pytest.approx(1.4) and whole.loss.kind == "bootstrap"
    assert (whole.n_texts, whole.n_failed, whole.bytes_ratio, whole.n_replayed) == (2, 1, 0.25, 2)
    assert whole.perplexity.mean == pytest.approx(math.exp((1 + 2) / 2 + 1.4))
    base = rows["dynamic", 1, 20]
    assert base.loss is None and base.kl is None and base.perplexity.mean == pytest.approx(math.exp(3))
    assert base.perplexity.low == pytest.approx(math.exp(bootstrapped([1, 2, 6]).low))


def test_tables_of_positions():
    lines = made_up()
    lines += [replace(line, length=200) for line in lines]
    text = as_markdown(by_position(lines, 20), "title")
    assert text.startswith("# title\n") and text.count("## ") == 8
    assert "| quant | 0.250 | 18.17 | 11.02 … 29.96 | +1.4000 | +1.4000 … +1.4000 | 0.7 | 0.7 … 0.7 | 2 + 1 |" in text
    by_bin = text.index("## KL by position, 200 tokens read")
    assert "| cache | 1–16 | 17–20 |" in text[by_bin:] and "| quant | 0.5 (0.5 … 0.5) | 1.5 (1.5 … 1.5) |" in text
    assert "| cache | 100 | 200 |" in text[text.index("## Loss to dense by tokens read") :]
    assert len(as_tables(by_position(lines, 20))) == 8


def test_a_lossless_cache_has_no_interval_of_shares():
    """Divergences of 0 are not right or wrong answers."""
    lines = [Continued(100, i, cache, [1.0], [0.0], 1, "") for i in range(3) for cache in ("dynamic", "dense")]
    (row,) = (row for row in by_position(lines, 1) if row.cache == "dense")
    assert (row.kl.mean, row.kl.low, row.kl.high, row.kl.kind) == (0, 0, 0, "bootstrap")
    assert (row.loss.low, row.loss.high) == (0, 0)
