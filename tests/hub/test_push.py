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
        beside = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(beside)
        command = [sys.executable, str(Path(__file__).with_name("pushing.py")), str(exported)]
        # not where the repositories are: folders go before names on the Hub
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=elsewhere)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWER "))
    return root / "someone", json.loads(line.removeprefix("ANSWER "))


@pytest.mark.slow
def test_a_repository_arrives_whole(hub, exported):
    root, answer = hub
    assert answer["push"] == 0
    sent = {path.name: path.read_bytes() for path in exported.iterdir()}
    arrived = {path.name: path.read_bytes() for path in (root / "exported").iterdir()}
    assert sent == arrived


@pytest.mark.slow
@pytest.mark.parametrize("name, n_tensors", [("bases", 16), ("heads", 8), ("decisions", 4)])
def test_adapters_there_and_back(hub, name, n_tensors):
    root, answer = hub
    assert answer[name] == n_tensors
    assert not list((root / name).glob("*.bin")) and list((root / name).glob("*.safetensors"))
    assert "pip install hf_kvcache" in json.loads((root / name / "adapter_config.json").read_text())["peft_type"]


@pytest.mark.slow
def test_a_folder_arrives_with_its_card(hub):
    root, answer = hub
    assert answer["carded"] == answer["heads"]
    assert {file.name for file in (root / "carded").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    first = ModelCard.load(root / "carded" / "README.md").text.partition("```")[2]
    assert first.startswith("bash\npip install hf_kvcache")


@pytest.mark.slow
def test_a_pickle_on_the_hub_is_not_fetched(hub):
    said = hub[1]["pickled"]
    assert len(said) == 2 and all("no adapter on the Hub" in message and "safetensors" in message for message in said)
    assert not list(hub[0].parent.glob("home/**/adapter_model.bin"))


@pytest.mark.slow
@pytest.mark.parametrize("order", [0, 1], ids=["bases-first", "lora-first"])
def test_kinds_and_a_lora_on_one_model(hub, order):
    """Bases twice, heads and a LoRA, loaded in one order and in the other, switched and disabled."""
    facts = hub[1]["mixed"][order]
    ranks = {name: facts.pop(name) for name in list(facts) if name.startswith("rank")}
    assert ranks == {
        "rank of bases": 16,
        "rank of fewer": 8,
        "rank beside LoRA": 8,
        "rank of none": None,
        "rank after deletion": 16,
    }
    assert len(facts) == 8 and all(facts.values()), facts


@pytest.mark.slow
def test_kinds_and_a_lora_by_peft(hub):
    assert hub[1]["nested"] == {"LoRA beneath": True, "fewer": 8, "bases": 16, "disabled": True}


@pytest.mark.slow
def test_decisions_and_a_lora_on_one_model(hub):
    facts = hub[1]["deciding"]
    assert len(facts) == 5 and all(facts.values()), facts


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
