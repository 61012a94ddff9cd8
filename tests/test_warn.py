"""Warnings of ours: once per process, and at the line that led to them."""

import warnings

import pytest
import torch
from cases import prompt, tiny_model
from transformers import DynamicCache

import hf_kvcache as kv
from hf_kvcache import compat, kernels
from hf_kvcache.warn import warn_once


def said_by(*calls):
    """What was said, by message, category and file, while every call ran."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for call in calls:
            call()
    return [(str(w.message), w.category, w.filename) for w in said if "hf_kvcache" in str(w.message)]


def test_a_warning_is_said_once_at_the_line_of_the_caller(unsaid):
    once = said_by(lambda: warn_once("so it is"), lambda: warn_once("so it is"))
    assert once == [("hf_kvcache: so it is", UserWarning, __file__)]


def test_frames_of_the_library_and_of_transformers_are_passed_over(unsaid):
    """The warning comes from a codec, below a model that transformers' `generate` calls."""
    model, ids = tiny_model("llama"), prompt(1, 80)

    def generate():
        model.generate(ids, **compat.cache_argument(kv.LowRankCache(window=8)), max_new_tokens=1, do_sample=False)

    ((message, _, filename),) = said_by(generate, generate)
    assert "calibrate lowrank" in message and filename == __file__


def test_the_fallback_of_an_op_is_said_once_for_every_reason(unsaid, monkeypatch):
    reasons = iter(["no compiler", "no compiler", "no memory"])
    monkeypatch.setattr(kernels, "_obstacle", lambda *args: next(reasons))
    monkeypatch.setattr(kernels, "_able", {})
    monkeypatch.delenv("HF_KVCACHE_BACKEND", raising=False)

    def select():
        kernels.select("quant_attention", torch.device("cpu"))

    said = said_by(select, select, select)
    assert [message.rpartition(": ")[2] for message, *_ in said] == ["no compiler", "no memory"]
    assert {filename for *_, filename in said} == {__file__}


def test_it_is_said_when_every_frame_is_passed_over(unsaid, monkeypatch):
    monkeypatch.setattr("hf_kvcache.warn._is_passed", lambda frame: True)
    assert [message for message, *_ in said_by(lambda: warn_once("nobody called"))] == ["hf_kvcache: nobody called"]


def test_compiled_code_says_it_without_a_break(unsaid):
    @torch.compile(fullgraph=True, backend="eager")
    def double(x):
        warn_once("this was traced")
        return 2 * x

    ((message, _, filename),) = said_by(lambda: double(torch.ones(2)))
    assert message == "hf_kvcache: this was traced" and filename == __file__


@pytest.mark.parametrize("make", [kv.KVCache, DynamicCache])
def test_a_forward_of_ours_uses_nothing_deprecated(make):
    model, ids = tiny_model("llama"), prompt(1, 40)
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("error", category)
        kv.prefill(model, ids, make(), chunk=16)
