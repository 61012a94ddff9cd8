"""Uploads to a stand-in for the Hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from stand_in import serve
from transformers import AutoModelForCausalLM

import hf_kvcache as kv
from hf_kvcache.adapters import AdapterError
from hf_kvcache.cli import main
from hf_kvcache.hub.export import export
from hf_kvcache.hub.push import check_exported
from hf_kvcache.models import embedded_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    where = tmp_path_factory.mktemp("push") / "repository"
    return export(AutoModelForCausalLM.from_pretrained(embedded_model()), kv.QuantCache(4), where, command="as it was")


@pytest.fixture(scope="module")
def hub(exported, tmp_path_factory):
    """What has come to the Hub, and what the process that pushed says."""
    root = tmp_path_factory.mktemp("hub")
    with serve({}, root) as address:
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(root / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, str(Path(__file__).with_name("pushing.py")), str(exported)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWER "))
    return root / "someone", json.loads(line.removeprefix("ANSWER "))


def test_a_repository_arrives_whole(hub, exported):
    root, answer = hub
    assert answer["push"] == 0
    sent = {path.name: path.read_bytes() for path in exported.iterdir()}
    arrived = {path.name: path.read_bytes() for path in (root / "exported").iterdir()}
    assert sent == arrived


@pytest.mark.parametrize("name, n_tensors", [("bases", 16), ("heads", 8), ("decisions", 4)])
def test_adapters_there_and_back(hub, name, n_tensors):
    root, answer = hub
    assert answer[name] == n_tensors
    assert not list((root / name).glob("*.bin")) and list((root / name).glob("*.safetensors"))


def test_the_card(exported):
    card = ModelCard.load(exported / "README.md")
    assert card.data.pipeline_tag == "text-generation" and card.data.library_name == "transformers"
    assert "quant" in card.data.tags and card.data.base_model is None
    assert "`as it was`" in card.text and '"codec": "Quantize"' in card.text
    assert str(embedded_model()) not in card.text + (exported / "config.json").read_text()


@pytest.mark.parametrize("gone", ["config.json", "README.md", "model.safetensors", "modeling_quant_llama.py"])
def test_what_is_not_whole_is_not_sent(exported, tmp_path, gone):
    broken = shutil.copytree(exported, tmp_path / "broken")
    check_exported(broken)
    (broken / gone).unlink()
    with pytest.raises(AdapterError, match="repository"):
        check_exported(broken)


def test_the_embedded_model_is_no_exported_one(capsys):
    assert main(["push", str(embedded_model()), "someone/small"]) == 2
    assert "is no exported repository" in capsys.readouterr().err
