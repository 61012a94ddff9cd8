"""The README of adapters: there for every kind, first how to load, and nobody's own is overwritten."""

import re

import pytest
from huggingface_hub import ModelCard
from kinds import KINDS, by_peft
from tiny_bases import model_of, random_bases

import hf_kvcache as kv
from hf_kvcache import registry

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
CACHES = {"bases": "kv.LowRankCache(", "heads": "kv.LocretCache(", "decisions": "kv.DMCCache("}


def first_code(text):
    shell, python = text.split("```")[1], text.split("```")[3]
    assert shell.startswith("bash\npip install hf_kvcache") and python.startswith("python\nimport hf_kvcache as kv")
    return python.removeprefix("python\n")


@pytest.mark.parametrize(
    ("kind", "methods"), [("bases", ["lowrank"]), ("heads", ["locret"]), ("decisions", ["dmc", "dms"])]
)
def test_papers_are_those_of_the_registry(kind, methods, tmp_path):
    KINDS[kind][0](tmp_path)
    numbers = re.findall(r"arXiv (\d+\.\d+)", ModelCard.load(tmp_path / "README.md").text)
    assert numbers == [registry.method(name).arxiv for name in methods]


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_says_how_to_load_it(kind, tmp_path, monkeypatch):
    KINDS[kind][0](tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "hf_kvcache" and "kv-cache" in card.data.tags
    assert card.data.base_model == (None if kind == "decisions" else "tiny/model")
    code = first_code(card.text)
    assert CACHES[kind] in code
    # what it says is what works, but for the names
    code = code.partition("model.generate")[0].replace("this repository", str(tmp_path))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda name: model_of())
    names = {}
    exec(code, names)
    assert names["model"].peft_config.keys() == {"default"} and isinstance(names["cache"], kv.KVCache)


def test_folders_are_nobodys_business(tmp_path):
    model = model_of()
    model.config._name_or_path = str(tmp_path / "secret")
    random_bases(model).made_for(model, str(tmp_path / "secret")).save(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model is None and "secret" not in card.content


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_makes_of_its_template_says_so_too(kind, tmp_path):
    KINDS[kind][0](tmp_path / "ours")
    peft.PeftModel.from_pretrained(model_of(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    card = ModelCard.load(tmp_path / "theirs" / "README.md")
    assert card.data.library_name == "peft" and f"PEFT {peft.__version__}" in card.text
    assert CACHES[kind] in first_code(card.text)
    # in a folder of its own there is no template
    by_peft(model_of(), tmp_path / "ours").save_pretrained(tmp_path / "named")
    first_code(ModelCard.load(tmp_path / "named" / "kv" / "README.md").text)


@pytest.mark.parametrize("kind", KINDS)
def test_what_somebody_has_written_stays(kind, tmp_path):
    own = "---\nlicense: mit\n---\n\n# Mine\n\nwith \u00fcmlauts\n"
    (tmp_path / "README.md").write_text(own, encoding="utf-8")
    KINDS[kind][0](tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == own
    peft.PeftModel.from_pretrained(model_of(), tmp_path).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "# Mine\n\nwith \u00fcmlauts" in card.text and card.data.license == "mit" and "import" not in card.text


def test_links_are_not_written_through(tmp_path):
    text = "Use the code below to get started with the model.\n\n[More Information Needed]"
    (tmp_path / "there").write_text(text)
    for name, target in (("a", "there"), ("b", "nowhere")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").symlink_to(tmp_path / target)
        KINDS["bases"][0](tmp_path / name)
    assert (tmp_path / "there").read_text() == text and not (tmp_path / "nowhere").exists()
