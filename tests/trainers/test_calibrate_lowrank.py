"""The calibration command, from a text file to a cache."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_kvcache as kv
from hf_kvcache.cli import main
from hf_kvcache.compat import cache_argument
from hf_kvcache.trainers import calibrate_lowrank

SHORT = ["--samples", "2", "--length", "96", "--allocator", "greedy"]


def test_from_text_to_cache(tmp_path, capsys):
    assert main(["calibrate", "lowrank", "--rank", "0.5", "--out", str(tmp_path / "adapter"), *SHORT]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["calibration tokens"] == 192
    assert 0.47 < printed["of a dense cache"] < 0.5
    assert len(printed["ranks of keys"]) == 4
    model = AutoModelForCausalLM.from_pretrained(kv.embedded_model(), attn_implementation="hf_kvcache")
    cache = kv.LowRankCache.from_adapter(tmp_path / "adapter")
    ids = torch.randint(3, 4000, (1, 300), generator=torch.Generator().manual_seed(0))
    model.generate(ids, max_new_tokens=2, do_sample=False, **cache_argument(cache))
    assert [layer.store.keys.rank for layer in cache.layers] == printed["ranks of keys"]


def test_a_folder_of_texts(tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("The miller looked at the river, and the river went by. " * 30)
    few = ["--samples", "1", "--length", "96", "--allocator", "measured", "--measured", "1"]
    out = ["--out", str(tmp_path / "adapter"), "--text", str(tmp_path)]
    assert main(["calibrate", "lowrank", *out, *few, "--prose-share", "0"]) == 2
    assert "too few to name facts by" in capsys.readouterr().err
    assert main(["calibrate", "lowrank", *out, *few, "--prose-share", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["calibration tokens"] == 96


def test_after_rope(tmp_path):
    out = ["--rope", "post", "--group-size-v", "1", "--out", str(tmp_path)]
    assert calibrate_lowrank.main([*out, *SHORT]) == 0
    bases = kv.Bases.load(tmp_path)
    assert bases.rope == "post" and bases.group_sizes == {"k": 1, "v": 1}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--length", "30000", "--text", __file__], "one sample needs"),
        (["--text", "no/such-dataset-at-all"], "no/such-dataset-at-all"),
        (["--text", str(Path(__file__).parent)], "no .txt files in"),
        (["--rank", "2"], "not a share"),
    ],
)
def test_mistakes_are_said(arguments, message, tmp_path, capsys):
    try:
        code = main(["calibrate", "lowrank", "--out", str(tmp_path), *SHORT, *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
