"""Layers on disk, brought for their turn by accelerate: caches, adapters and decisions do what they do anyway."""

import pytest
from parallel_models import save_models
from sharded import RETROFITS, answers

ON_DISK = {"model.layers.1": "disk"} | dict.fromkeys(
    ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0"), "cpu"
)
NAMES = ["dense", "quant4-window8", "lowrank0.5-window8", "fitted online", "adakv-budget42", "tova"]
NAMES += ["bases", "heads", *RETROFITS]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", NAMES)
def test_layers_on_disk(models, tmp_path, name):
    expected = answers(models, [name])[name]
    found = answers(models, [name], device_map=dict(ON_DISK), offload_folder=tmp_path)[name]
    assert found["tokens"] == expected["tokens"] and found["nbytes"] == expected["nbytes"]
    assert (found["logits"] - expected["logits"]).abs().max() < 1e-5
