"""Hostile and damaged adapters of every kind, by every loader: refused, and the model is as it was."""

import copy
import json

import pytest
import torch
from cases import generate, prompt
from kinds import (
    CAREFUL,
    CONFIG,
    CONFIG_DAMAGE,
    FILE_DAMAGE,
    FOREIGN_DAMAGE,
    KINDS,
    LOADERS,
    TENSOR_DAMAGE,
    TENSORS,
    by_attach,
    by_peft,
    by_transformers,
    name_of,
    pickled,
)
from safetensors.torch import load_file
from tiny_bases import model_of
from tiny_heads import watch

from hf_kvcache.adapters import AdapterError, LowRankKVConfig, attach
from hf_kvcache.adapters.modules import CHILDREN

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
DAMAGE = FILE_DAMAGE | TENSOR_DAMAGE | CONFIG_DAMAGE


@pytest.fixture
def folder(made, tmp_path):
    """To be damaged, beside one that is not."""
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        for file in made[1].iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    return tmp_path / "bad"


def used(model, kind):
    return generate(model, prompt(1, 30), KINDS[kind][3](), max_new_tokens=2).sequences


def assert_untouched(model, children=False):
    """Neither weights nor hooks are others than before; nor are there children, unless there may be."""
    held = {name: p for name, p in model.named_parameters() if not any(child in name for child in CHILDREN)}
    fresh = dict(model_of().named_parameters())
    assert held.keys() == fresh.keys() and all(torch.equal(p, fresh[name]) for name, p in held.items())
    if not children:
        assert not any(child in name for name, _ in model.named_modules() for child in CHILDREN)
        assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("loader", LOADERS)
def test_loaded_and_used(kind, folder, loader):
    """What the others are to be compared with."""
    model = LOADERS[loader](model_of(), folder)
    assert torch.equal(used(model, kind), used(by_attach(model_of(), folder), kind))


@pytest.mark.parametrize("loader", CAREFUL)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(kind, folder, loader, damage):
    spoil, message = DAMAGE[damage]
    spoil(folder, kind)
    model = model_of()
    with pytest.raises(AdapterError, match=message):
        CAREFUL[loader](model, folder)
    assert_untouched(model, children=loader == "PeftModel.load_adapter")
    assert not any("kv" in getattr(m, "ropes", getattr(m, "_settings", {})) for m in model.modules())


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("damage", FOREIGN_DAMAGE)
def test_what_is_no_adapter_of_ours_is_refused(kind, folder, loader, damage):
    FOREIGN_DAMAGE[damage](folder, kind)
    model = model_of()
    # PEFT's own, before it asks us
    expected = AdapterError if loader == "attach" else (ValueError, KeyError, TypeError, RecursionError)
    with pytest.raises(expected):
        LOADERS[loader](model, folder)
    assert_untouched(model, children=loader == "PeftModel.load_adapter")


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_transformers_refuses_what_the_config_says(kind, folder, damage):
    spoil, _ = CONFIG_DAMAGE[damage]
    spoil(folder, kind)
    model = model_of()
    with pytest.raises((AdapterError, RuntimeError)):
        used(by_transformers(model, folder), kind)
    assert_untouched(model, children=True)


@pytest.mark.parametrize("damage", ["missing tensor", "NaN", "infinity"])
def test_what_transformers_lets_through_is_not_used(kind, folder, damage):
    """It warns at most, and has no place where an adapter could refuse."""
    spoil, _ = TENSOR_DAMAGE[damage]
    spoil(folder, kind)
    model = by_transformers(model_of(), folder)
    with pytest.raises(AdapterError, match="'kv': weights were missing in its file, or are NaN"):
        used(model, kind)


def test_a_compiler_meets_heads_that_nobody_has_looked_at(tmp_path):
    """Looking at their values would break its graph."""
    KINDS["heads"][0](tmp_path)
    model = by_attach(model_of(), tmp_path)
    seen = watch(model, lambda child: child.scores())
    with torch.no_grad():
        torch.compile(model, backend="aot_eager", fullgraph=True)(prompt(1, 7), use_cache=False)
        compiled = dict(seen)
        model(prompt(1, 7), use_cache=False)
    assert all(torch.allclose(compiled[i], seen[i], atol=1e-5) for i in (0, 1))


@pytest.mark.parametrize("damage", ["truncated", "empty", "wrong shape", "transposed", "pickle", "pickle in disguise"])
def test_transformers_refuses_by_itself(kind, folder, damage):
    spoil, _ = DAMAGE[damage]
    spoil(folder, kind)
    with pytest.raises(Exception, match="adapter_model|deserializing|mismatch"):
        by_transformers(model_of(), folder)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle has been read')",)


@pytest.mark.parametrize("loader", LOADERS)
def test_no_pickle_is_opened(kind, folder, loader):
    pickled(folder, kind)
    torch.save(Bomb(), folder / "adapter_model.bin")
    with pytest.raises(AdapterError if loader in CAREFUL else Exception) as raised:
        LOADERS[loader](model_of(), folder)
    assert "weights_only" not in str(raised.value), "it has been opened"


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_tensors_that_peft_was_handed(kind, folder, damage):
    """`PeftModel.from_pretrained(..., config=...)` and `set_peft_model_state_dict` do not ask for a config first."""
    config = peft.PeftConfig.from_pretrained(folder)
    spoil, message = TENSOR_DAMAGE[damage]
    spoil(folder, kind)
    model = model_of()
    with pytest.raises(AdapterError, match=message):
        peft.PeftModel.from_pretrained(model, folder, adapter_name="kv", config=copy.deepcopy(config))
    assert_untouched(model, children=True)
    injected = peft.inject_adapter_in_model(copy.deepcopy(config), model_of(), "kv")
    with pytest.raises(AdapterError, match=message):
        peft.set_peft_model_state_dict(injected, load_file(folder / TENSORS), "kv")
    peft.set_peft_model_state_dict(injected, load_file(folder.with_name("good") / TENSORS), "kv")
    assert used(injected, kind).shape == (1, 32)


@pytest.mark.parametrize("source", ["../up", "a/../b", "a/b/c", "~/x", "name/..", "", "https://x/y", "/etc/passwd"])
def test_sources_that_are_paths_in_disguise(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AdapterError, match="neither a folder nor the name of a repository|Not a directory|holds no"):
        attach(model_of(), source)


@pytest.mark.parametrize("loader", ["attach", "PeftModel", "transformers"])
@pytest.mark.parametrize("other", [dict(seed=1), dict(arch="qwen3"), dict(arch="phi3")], ids=str)
def test_another_base_model_is_refused_by_name(kind, folder, loader, other):
    model = model_of(**other)
    with pytest.raises(AdapterError, match=r"this adapter \(of .*\) does not fit: .*: the adapter is for"):
        LOADERS[loader](model, folder)
    assert not any(child in name for name, _ in model.named_modules() for child in CHILDREN)


def test_what_peft_writes_says_the_same(kind, folder, tmp_path):
    """Versions and fingerprint come back from PEFT as we wrote them."""
    by_peft(model_of(), folder).save_pretrained(tmp_path)
    again = tmp_path / "kv"
    ours, theirs = (json.loads((where / CONFIG).read_text()) for where in (folder, again))
    names = ("peft_type", "format_version", "hf_kvcache_version", "fingerprint")
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    assert len(ours["fingerprint"]["weights"]) == 32 and ours["format_version"] == 1
    assert {file.name for file in again.iterdir()} == {CONFIG, TENSORS, "README.md"}
    mine, its = (by_attach(model_of(), where) for where in (folder, again))
    assert torch.equal(used(mine, kind), used(its, kind))


def test_nothing_is_pickled(kind, folder, tmp_path):
    model = peft.PeftModel.from_pretrained(model_of(), folder)
    with pytest.raises(AdapterError, match="safetensors, and nothing else"):
        model.save_pretrained(tmp_path / "again", safe_serialization=False)
    assert not (tmp_path / "again" / CONFIG).exists()


def test_a_config_alone_is_read(tmp_path):
    LowRankKVConfig(ranks_k=4).save_pretrained(tmp_path)
    assert LowRankKVConfig.from_pretrained(tmp_path).ranks_k == 4
    assert name_of("bases") not in (tmp_path / CONFIG).read_text()
