import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_kvcache as kv
from hf_kvcache import dmc
from hf_kvcache.compat import cache_argument
from hf_kvcache.trainers.fit_decisions import main
from hf_kvcache.trainers.train_retaining_heads import main as train_heads


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """What was recorded of the embedded model."""
    folder = tmp_path_factory.mktemp("recorded")
    heads = ["--out", str(folder / "heads"), "--max-steps", "1", "--prompt-tokens", "256", "--answer-tokens", "64"]
    heads += ["--d-r", "8", "--valid-prompts", "1", "--n-recent", "8", "--recorded", "8", "--recordings", str(folder)]
    with torch.enable_grad():
        train_heads([*heads, "--target", "answer_weight"])
    return folder


def test_as_many_tokens_go_as_asked_for(recorded, tmp_path):
    out = tmp_path / "dms"
    common = ["--recordings", str(recorded), "--window", "8"]
    report = main([*common, "--out", str(out), "--ratio", "4", "--valid-prompts", "3"])
    assert report["ratio"] == pytest.approx(4, rel=0.05)
    assert report["kept of those to be kept"] > 0.3, "by chance a quarter"
    assert json.loads((out / "training.json").read_text()) == report
    model = AutoModelForCausalLM.from_pretrained(kv.embedded_model(), attn_implementation="hf_kvcache")
    kv.attach(model, out)
    cache, ids = kv.DMSCache(), torch.randint(3, 4000, (1, 400), generator=torch.Generator().manual_seed(0))
    model(ids, **cache_argument(cache))
    assert 0.15 < cache.nbytes / cache.nbytes_dense < 0.7
    assert dmc.retrofits(model)[0].settings.window == 8


@pytest.mark.parametrize(
    "arguments, message",
    [(["--ratio", "1"], "drops nothing"), (["--valid-prompts", "8"], "has 8 recorded prompts")],
)
def test_what_cannot_be_fitted(recorded, arguments, message, tmp_path):
    common = ["--recordings", str(recorded), "--out", str(tmp_path)]
    with pytest.raises(ValueError, match=message):
        main([*common, *arguments])
