"""Two processes share a model: caches hold the KV heads of their process, and nothing else changes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import SIZES, new_model
from parallel_models import save_models
from rooms import is_whole, telling
from sharded import JOBS, answers
from transformers import LlamaConfig

from hf_kvcache.sharded_model import shard_of

OTHERS = "saved", "spanning", "whole weights"
ONE_BY_ONE = [name for name in JOBS if name not in OTHERS]
# one of every kind of rows, of deciding which of them stay, and of model
SHORT = ["dense", "quant4-window8", "sparse0.5-window8", "lowrank0.5-window8", "snapkv-budget24", "duo", "adakv-quant8"]
SHORT += ["tova", "qwen3 adakv-budget42", "phi3 quant4-window8", "fitted online", "beams", "bases", "heads", "dms"]
SHORT += ["dmc-linear", "read twice"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, pytestconfig):
    return save_models(tmp_path_factory.mktemp("models"), exported=is_whole(pytestconfig))


@pytest.fixture(scope="module")
def both(models, tmp_path_factory, pytestconfig):
    """Answers of two processes."""
    jobs = JOBS if is_whole(pytestconfig) else [*SHORT, *OTHERS]
    out = tmp_path_factory.mktemp("answers")
    script = Path(__file__).with_name("sharded.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, script, models, out, *jobs], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [torch.load(out / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", telling(ONE_BY_ONE, *SHORT))
def test_two_processes_say_what_one_says(models, both, name):
    [one], two = answers(models, [name]).values(), [answer[name] for answer in both]
    is_gathered = name.startswith("phi3")
    for answer in two:
        assert answer["tokens"] == one["tokens"]
        assert (answer["logits"] - one["logits"]).abs().max() < 1e-3
        assert answer["heads"] == ({2} if is_gathered else {n // 2 for n in one["heads"]})
    total = sum(answer["nbytes"] for answer in two)
    if is_gathered:
        assert total == 2 * one["nbytes"]
    elif one["lengths"]:
        # pools of pages grow in steps, larger ones than these few rows
        for layer, lengths in enumerate(one["lengths"]):
            assert torch.equal(torch.cat([answer["lengths"][layer] for answer in two], 1), lengths)
    else:
        assert total == one["nbytes"] + one["common"]


def test_a_group_of_heads_that_spans_processes_is_refused(both):
    for answer in both:
        assert "1 groups of 4 heads, which cannot be shared out among 2 processes" in answer["spanning"]["error"]


def test_what_needs_whole_weights_is_refused(both):
    for answer in both:
        assert set(answer["whole weights"]) == {"decompose", "observe"}
        for error in answer["whole weights"].values():
            assert "this model is shared by several processes: load it in one" in error


def test_a_saved_cache_is_that_of_its_process(both):
    for answer in both:
        assert answer["saved"]["goes on"]
        assert "shard" in answer["saved"]["error"]


def test_weights_that_do_not_say_whose_heads_these_are():
    attention = new_model(LlamaConfig(**SIZES), "sdpa").model.layers[0].self_attn
    assert shard_of(attention, 1).count == 1
    with pytest.raises(ValueError, match="layer 0 computes one of 2 parts"):
        shard_of(attention, 2)
