"""What is asked, of whom and when; and that a killed run goes on where it stopped."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from toy_tasks import COLOURS, small_model
from transformers import DynamicCache

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument
from hf_kvcache.eval import questioning, running
from hf_kvcache.eval.asking import decode, feed, stops_of
from hf_kvcache.eval.batches import Asked, batches
from hf_kvcache.eval.lines import Line, Lines, OtherRun
from hf_kvcache.eval.peers import is_installed
from hf_kvcache.eval.prompts import Prompter
from hf_kvcache.eval.running import Plan, Settings, build_instance, evaluate, most_tokens
from hf_kvcache.eval.specs import parse

SPECS = tuple(map(parse, ("dynamic", "quant:bits=8,window=16", "snapkv:ratio=0.5")))
SETTINGS = Settings(n_questions=2)
PLAN = Plan((COLOURS,), (128,), 2, ("known", "unknown", "turns"), SPECS)
ABOUT = {"model": "small", "date": "today", "settings": {"seed": 0}}


@pytest.fixture(scope="module")
def small():
    return small_model()


@pytest.fixture(scope="module")
def answered(small):
    lines = Lines(None, ABOUT)
    evaluate(*small, PLAN, SETTINGS, lines)
    return lines


def by_key(lines):
    return {line.key: line for line in lines}


def test_every_question_has_a_line(answered):
    lines = by_key(answered)
    expected = {
        ("colours", 128, i, setting, spec.text, q)
        for i in range(2)
        for setting in PLAN.settings
        for spec in SPECS
        for q in range(2)
    }
    assert set(lines) == expected and len(expected) == PLAN.n_lines(SETTINGS) == len(answered)
    for line in lines.values():
        assert line.error is None and 0 <= line.score <= 1 and 0 <= line.n_answer <= 3
        dense = lines[*line.key[:4], "dynamic", line.question]
        assert (line.n_read, line.n_asked) == (dense.n_read, dense.n_asked)
        if line.cache != "dynamic":
            assert 0.2 * dense.nbytes < line.nbytes < 0.95 * dense.nbytes
        # a question that is known is part of what is compressed
        assert (line.n_asked == 0) == (line.setting == "known") and line.n_read <= 128


def test_prompts_are_as_long_as_asked(small, answered):
    known = [line.n_read for line in answered if line.setting == "known"]
    # the filler comes in sentences
    assert 128 - 20 < min(known) <= max(known) <= 128


def test_dense_answers_are_those_of_generate(small, answered):
    """The same ids, read at once or in two parts, are answered as `generate` does."""
    model, tokenizer = small
    prompter = Prompter(tokenizer)
    for i in range(2):
        instance = build_instance(COLOURS, prompter, 128, i, SETTINGS)
        prompt = prompter.prompt(instance)
        for q, asked in enumerate(prompt.questions):
            ids = torch.tensor([prompt.context + asked])
            out = model.generate(ids, max_new_tokens=3, do_sample=False, **cache_argument(DynamicCache()))
            expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            for setting in ("known", "unknown"):
                assert by_key(answered)["colours", 128, i, setting, "dynamic", q].answer == expected


def test_turns_follow_what_was_said(small, answered):
    model, tokenizer = small
    prompt = Prompter(tokenizer).prompt(build_instance(COLOURS, Prompter(tokenizer), 128, 1, SETTINGS))
    stops = stops_of(model, tokenizer)
    ids = prompt.context + prompt.questions[0]
    cache = DynamicCache()
    (first,) = decode(model, cache, feed(model, cache, torch.tensor([ids])), stops, 3)
    cache = DynamicCache()
    ids = torch.tensor([ids + first + prompt.turns[0]])
    (second,) = decode(model, cache, feed(model, cache, ids), stops, 3)
    lines = [by_key(answered)["colours", 128, 1, "turns", "dynamic", q] for q in range(2)]
    assert [line.answer for line in lines] == [tokenizer.decode(x, skip_special_tokens=True) for x in (first, second)]
    assert lines[1].n_asked > lines[0].n_asked


def test_an_unknown_question_is_asked_of_a_copy(small, monkeypatch):
    """The context is read once per cache, and no question changes what another one finds."""
    read = []

    def counted(model, cache, ids, n_padding=None):
        read.append(ids.shape[1])
        return feed(model, cache, ids, n_padding)

    monkeypatch.setattr(questioning, "feed", counted)
    monkeypatch.setattr("hf_kvcache.eval.reading.feed", counted)
    plan = replace(PLAN, n_instances=1, settings=("unknown",), specs=SPECS[1:])
    settings, both = replace(SETTINGS, replays=False), Lines(None, ABOUT)
    evaluate(*small, plan, settings, both)
    assert sum(n > 64 for n in read) == len(plan.specs)
    # the second question alone
    alone = Lines(None, ABOUT)
    for line in both:
        if line.question == 0:
            alone.add(line)
    evaluate(*small, plan, settings, alone)
    assert by_key(alone) == by_key(both)


def test_the_order_of_settings_changes_nothing(small):
    """The last use of a cache may change it, whichever that is: a conversation before questions has one of its own."""
    found = []
    for settings in (("unknown", "turns"), ("turns", "unknown")):
        found.append(Lines(None, ABOUT))
        evaluate(*small, replace(PLAN, n_instances=1, settings=settings, specs=SPECS[:2]), SETTINGS, found[-1])
    assert by_key(found[0]) == by_key(found[1])


@pytest.mark.parametrize("text", ["dynamic", "quant:bits=4,window=8", "snapkv:ratio=0.5", "adakv:ratio=0.5"])
def test_a_copy_of_a_cache_is_a_cache_of_its_own(small, text):
    model, tokenizer = small
    ids = torch.tensor([tokenizer("The rain fell on the harbour and the boats lay still. " * 12)["input_ids"]])
    cache = parse(text).build(model.config)
    feed(model, cache, ids)
    fork = copy.deepcopy(cache)
    first = feed(model, fork, ids[:, 1:9])
    again = feed(model, copy.deepcopy(cache), ids[:, 1:9])
    assert torch.equal(first, again) and cache.get_seq_length() == ids.shape[1] < fork.get_seq_length()
    assert torch.equal(first, feed(model, cache, ids[:, 1:9]))


def test_what_cannot_be_copied_is_compressed_once_more(small, answered, monkeypatch):
    """As quantised tensors of optimum-quanto."""

    def refused(cache, memo):
        raise RuntimeError("the default implementation of __deepcopy__() does not work")

    monkeypatch.setattr(kv.KVCache, "__deepcopy__", refused)
    lines = Lines(None, ABOUT)
    evaluate(*small, PLAN, SETTINGS, lines)
    assert by_key(lines) == by_key(answered)


def test_a_setting_that_fails_fails_alone(small, monkeypatch):
    monkeypatch.setattr(questioning, "fork", lambda *args: 1 / 0)
    lines = Lines(None, ABOUT)
    evaluate(*small, replace(PLAN, n_instances=1), SETTINGS, lines)
    assert {line.setting for line in lines if line.error} == {"unknown"} and len(lines) == 18


def test_one_failure_is_one_row(small, monkeypatch):
    monkeypatch.setattr(kv.QuantCache, "update", lambda *args, **kwargs: 1 / 0)
    lines = Lines(None, ABOUT)
    evaluate(*small, replace(PLAN, n_instances=1), SETTINGS, lines)
    failed = {line.cache for line in lines if line.error}
    assert failed == {"quant:bits=8,window=16"} and len(lines) == 18
    assert all(line.error == "ZeroDivisionError: division by zero" for line in lines if line.cache in failed)
    # they are asked for again
    monkeypatch.undo()
    evaluate(*small, replace(PLAN, n_instances=1), SETTINGS, lines)
    assert not [line for line in lines if line.error]


# -- batches ---------------------------------------------------------------------------------------------------------

TOGETHER = (
    "dynamic",
    "quant:bits=8,window=16",
    "snapkv:ratio=0.5",
    "adakv:ratio=0.5",
    "kvzip:ratio=0.5",
    # a peer that not every environment has
    *(["hqq:bits=8"] if is_installed("hqq") else []),
)


def test_texts_asked_together_are_answered_as_alone(small):
    plan = Plan((COLOURS,), (128,), 7, ("known", "unknown"), tuple(map(parse, TOGETHER)))
    alone, together = Lines(None, ABOUT), Lines(None, ABOUT)
    settings = replace(SETTINGS, n_questions=1)
    evaluate(*small, plan, settings, alone)
    advanced = []
    evaluate(*small, replace(plan, batch_size=3), settings, together, lambda stage, n: advanced.append((stage, n)))
    assert by_key(together).keys() == by_key(alone).keys() and sum(n for _, n in advanced) == plan.n_lines(settings)
    assert max(n for _, n in advanced) == 3
    for key, line in by_key(together).items():
        other = by_key(alone)[key]
        assert line.error is None and replace(line, nbytes=0) == replace(other, nbytes=0)
        # rows of padding take a little, and spare pages are shared
        assert 0.75 * other.nbytes <= line.nbytes <= 1.25 * other.nbytes


def test_a_batch_goes_on_where_answers_are_missing(small, monkeypatch):
    plan = Plan((COLOURS,), (128,), 4, ("unknown",), SPECS[1:2], batch_size=4)
    settings = replace(SETTINGS, n_questions=1)
    whole, begun, asked = Lines(None, ABOUT), Lines(None, ABOUT), []
    evaluate(*small, plan, settings, whole)
    for line in list(whole)[:1]:
        begun.add(line)
    monkeypatch.setattr(begun, "add", lambda line: (asked.append(line.instance), Lines.add(begun, line)))
    evaluate(*small, plan, settings, begun)
    assert by_key(begun) == by_key(whole) and len(asked) == 3


def test_only_questions_of_one_length_are_asked_together(small):
    prompter = Prompter(small[1])
    rows = [build_instance(COLOURS, prompter, 128, i, replace(SETTINGS, n_questions=1)) for i in range(24)]
    asked = [Asked(i, row, prompter.prompt(row), {("known", "dynamic"): [0]}) for i, row in enumerate(rows)]
    found = list(batches(COLOURS, 128, asked, 4, None))
    assert sorted(row.number for batch in found for row in batch.rows) == list(range(24))
    lengths = [{len(row.prompt.questions[0]) for row in batch.rows} for batch in found]
    assert all(len(one) == 1 for one in lengths) and len(set.union(*lengths)) > 1
    assert max(len(batch.rows) for batch in found) <= 4 and {tuple(batch.n_new) for batch in found} == {(3,)}
    assert {tuple(batch.n_new) for batch in batches(COLOURS, 128, asked, 4, 2)} == {(2,)}


def test_turns_are_asked_alone(small):
    with pytest.raises(ValueError, match="turns cannot be asked of several texts at once"):
        evaluate(*small, replace(PLAN, batch_size=2), SETTINGS, Lines(None, ABOUT))


def test_answers_are_as_long_as_allowed(small):
    lines = Lines(None, ABOUT)
    evaluate(*small, replace(PLAN, settings=("known",)), replace(SETTINGS, max_new_tokens=1), lines)
    assert {line.n_answer for line in lines} <= {0, 1}


# -- lines -----------------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on(small, answered, tmp_path, monkeypatch):
    path = tmp_path / "eval.jsonl"
    lines, n_whole = Lines(path, ABOUT), len(answered)

    def killed(line):
        if len(lines) == 7:
            # the half of a line that got to the disk
            path.open("a").write('{"task": "colou')
            raise KeyboardInterrupt
        Lines.add(lines, line)

    monkeypatch.setattr(lines, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*small, PLAN, SETTINGS, lines)
    advanced, asked = [], []
    on = Lines(path, ABOUT | {"date": "tomorrow"})
    assert len(on) == 7
    monkeypatch.setattr(on, "add", lambda line: (asked.append(line.key), Lines.add(on, line)))
    evaluate(*small, PLAN, SETTINGS, on, lambda stage, n: advanced.append(n))
    assert by_key(on) == by_key(answered) and sum(advanced) == n_whole
    # but for a conversation, which is taken up from its beginning, nothing is asked twice
    assert n_whole - 7 <= len(asked) <= n_whole - 6
    first, *written = map(json.loads, path.read_text().splitlines())
    assert first == ABOUT and by_key(Line(**line) for line in written) == by_key(answered)
    # and a third time there is nothing left to do
    monkeypatch.setattr(running, "build_instance", lambda *args: pytest.fail("an instance was built"))
    evaluate(*small, PLAN, SETTINGS, Lines(path, ABOUT))


def test_lines_of_another_run_are_refused(tmp_path):
    path = tmp_path / "eval.jsonl"
    Lines(path, ABOUT).add(Line("colours", 128, 0, "known", "dynamic", 0, score=1.0))
    before = path.read_bytes()
    with pytest.raises(OtherRun, match="settings.seed was 0, now it is 1; write to another folder"):
        Lines(path, ABOUT | {"settings": {"seed": 1}})
    with pytest.raises(OtherRun, match="model was 'small', now it is 'large'"):
        Lines(path, ABOUT | {"model": "large"})
    assert path.read_bytes() == before and len(Lines(path, ABOUT)) == 1
    path.write_text("not JSON\n")
    with pytest.raises(OtherRun, match="is no evaluation"):
        Lines(path, ABOUT)
    assert path.read_text() == "not JSON\n"
    # killed before the first line was whole
    path.write_text('{"model": "sm')
    assert len(Lines(path, ABOUT)) == 0 and json.loads(path.read_text()) == ABOUT


# -- instances -------------------------------------------------------------------------------------------------------


def test_instances_are_drawn_from_the_seed(small):
    prompter = Prompter(small[1])

    def built(i=0, length=128, **changed):
        return build_instance(COLOURS, prompter, length, i, replace(SETTINGS, n_questions=4, **changed))

    assert built() == built()
    assert len({str(one) for one in (built(), built(1), built(seed=1), built(length=160))}) == 4
    assert len(built().questions) == 4


def test_a_task_of_one_question_says_so(small):
    def build(count, n_tokens, rng):
        return COLOURS.build(count, n_tokens, rng)

    with pytest.raises(ValueError, match="single asks one question about a context, not 2"):
        build_instance(replace(COLOURS, name="single", build=build), Prompter(small[1]), 128, 0, SETTINGS)


def test_what_a_run_needs_is_known_before(small, answered):
    n = most_tokens(PLAN, Prompter(small[1]), SETTINGS)
    turns = [line for line in answered if line.setting == "turns" and line.instance == 0 and line.question == 1]
    assert n == turns[0].n_read + turns[0].n_asked + 2 * 3
