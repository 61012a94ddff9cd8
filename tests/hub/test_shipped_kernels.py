"""Triton kernels as they are shipped: run in the interpreter, in a process that it is set up for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import new_model
from test_export import bases, retrofitted
from transformers import LlamaConfig

import hf_kvcache as kv
from hf_kvcache.adapters import attach
from hf_kvcache.hub.export import export

CONFIG = dict(vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=512)
CONFIG |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=64)


def low_rank(model):
    attach(model, bases(model.config))
    return model


FAMILIES = {
    "quant": (None, lambda: kv.QuantCache(4, window=8), {"quant_attention", "quant_pack"}),
    "mustafar": (None, lambda: kv.SparseCache(0.5, window=8), {"sparse_attention", "sparse_pack"}),
    "palu": (low_rank, lambda: kv.LowRankCache(window=8), {"dense_attention", "lowrank_attention"}),
    "palu4": (
        low_rank,
        lambda: kv.LowRankCache(bits=4, window=8),
        {"dense_attention", "lowrank_attention", "quant_pack"},
    ),
    "dmc": (retrofitted("dmc"), kv.DMCCache, {"merge_step", "ragged_attention", "slot_step"}),
    "dms8": (
        retrofitted("dms"),
        lambda: kv.DMSCache(kv.Quantize(8, axis="token")),
        {"quant_pack", "ragged_attention", "slot_step"},
    ),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What a process finds in which Triton interprets."""
    root = tmp_path_factory.mktemp("shipped")
    for name, (prepare, make, _) in FAMILIES.items():
        model = new_model(LlamaConfig(**CONFIG), "eager")
        export(model if prepare is None else prepare(model), make(), root / name)
    folders = [str(root / name) for name in FAMILIES]
    script = str(Path(__file__).with_name("interpreted.py"))
    environment = os.environ | {"TRITON_INTERPRET": "1", "HF_MODULES_CACHE": str(root / "modules")}
    done = subprocess.run([sys.executable, script, *folders], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    return {Path(folder).name: answer for each in found for folder, answer in each.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_runs_on_the_kernels_it_ships(answers, name):
    answer, ops = answers[name], FAMILIES[name][2]
    assert answer["used"] == sorted([op, "triton"] for op in ops)
    assert answer["difference"] < 1e-3 * answer["scale"], answer
