"""What the base of all kinds of adapters promises: asked of each of them."""

import json

import pytest
import torch
from kinds import CONFIG, KINDS, by_attach, refingerprint, reword
from tiny_bases import model_of, random_bases
from tiny_heads import heads_of

from hf_kvcache.adapters import AdapterError, attach
from hf_kvcache.adapters.modules import attentions

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(made, tmp_path):
    for file in made[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("load", [by_attach, lambda m, f: peft.inject_adapter_in_model(config_of(f), m, "kv")])
def test_an_adapter_that_does_not_fit_leaves_no_name(kind, folder, load):
    """Beside one that does, whose configs PEFT keeps by name."""
    model = model_of()
    attach(model, folder, "good")
    good = json.loads((folder / CONFIG).read_text())
    refingerprint(folder, weights="0" * 32)
    with pytest.raises(AdapterError, match="weights: the adapter is for"):
        load(model, folder)
    assert model.peft_config.keys() == {"good"}
    reword(folder, **good)
    load(model, folder)
    assert model.peft_config.keys() == {"good", "kv"}


def config_of(folder):
    return peft.PeftConfig.from_pretrained(folder)


def test_what_is_no_adapter_is_not_written_over(kind, folder):
    """Models of repositories carry what their cache needs under the names of our children."""
    model, child = model_of(), KINDS[kind][1]
    setattr(attentions(model)[1].module, child, torch.nn.Linear(1, 1))
    with pytest.raises(AdapterError, match="layer 1 .* already, and not by an adapter"):
        attach(model, folder)
    assert not hasattr(attentions(model)[0].module, child) and not getattr(model, "peft_config", {})


def test_training_records_the_model(kind, folder):
    """What is trained on a model belongs to it from then on, whatever the file has said."""
    known = json.loads((folder / CONFIG).read_text())["fingerprint"]
    reword(folder, fingerprint=None)
    model = model_of()
    attach(model, folder, "used")
    assert model.peft_config["used"].fingerprint is None
    if kind == "bases":
        with pytest.raises(TypeError, match="trainable=True: a low-rank KV adapter has no parameters"):
            attach(model, folder, "trained", trainable=True)
        return
    attach(model, folder, "trained", trainable=True)
    assert model.peft_config["trained"].fingerprint == known
    assert all(p.requires_grad for name, p in model.named_parameters() if name.endswith(".trained"))
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".used"))


@pytest.mark.parametrize("make", [random_bases, heads_of])
def test_a_layer_that_the_model_lacks_is_named(make):
    with pytest.raises(AdapterError, match=r"layers: the model has 1, the adapter is for \[0, 1\]"):
        make(model_of()).made_for(attentions(model_of())[1].module)


@pytest.mark.parametrize("make", [random_bases, heads_of])
def test_what_would_not_be_read_is_not_written(make, tmp_path):
    with pytest.raises(AdapterError, match="is torch.float64; this adapter would be refused"):
        make(model_of()).to(torch.float64).save(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").iterdir())
