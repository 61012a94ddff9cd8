"""Bases of a whole model: what they say of themselves, their files, and which models they fit."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_bases import FAMILIES, assert_same_bases, model_of, random_bases, random_basis

from hf_kvcache.adapters import AdapterError, Bases
from hf_kvcache.adapters.base_weights import weights_digest
from hf_kvcache.adapters.modules import attentions

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


@pytest.fixture(scope="module")
def bases(model):
    cache = {"class": "LowRankCache", "kwargs": {"bits": 4, "window": 8}}
    return random_bases(model, budget={"share": 0.5}, cache=cache)


@pytest.fixture
def saved(bases, model, tmp_path):
    return bases.save(tmp_path / "adapter", model)


# -- what they say -----------------------------------------------------------------------------------------------------


def test_they_say_what_they_are(bases):
    assert bases.ranks == {0: {"k": 8, "v": 12}, 1: {"k": 7, "v": 11}}
    assert (bases.n_kv_heads, bases.head_dim, bases.n_layers) == (2, 16, 2)
    assert bases.group_sizes == {"k": 1, "v": 2}
    assert bases.of(1, "k").rank == 7 and bases.of(2, "k") is None and bases.of(0, "q") is None
    # keys have two groups, values one
    assert bases.nbytes_per_token(2) == 2 * (2 * (8 + 7) + (12 + 11))


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (4, {0: {"k": 4, "v": 4}, 1: {"k": 4, "v": 4}}),
        ({"v": 4}, {0: {"k": 8, "v": 4}, 1: {"k": 7, "v": 4}}),
        ({1: {"k": 2}}, {0: {"k": 8, "v": 12}, 1: {"k": 2, "v": 11}}),
    ],
)
def test_truncated_keeps_the_leading_directions(bases, ranks, expected):
    shorter = bases.truncated(ranks)
    assert shorter.ranks == expected
    assert torch.equal(shorter.of(1, "k").down, bases.of(1, "k").down[..., : expected[1]["k"]])
    assert shorter.fingerprint == bases.fingerprint


def test_more_directions_than_there_are_raise(bases):
    with pytest.raises(ValueError, match="no 9 directions"):
        bases.truncated(9)


def test_bases_that_do_not_belong_together_raise(bases):
    generator = torch.Generator().manual_seed(0)
    for other in (
        random_basis(2, 16, 2, 8, True, generator),
        random_basis(2, 16, 1, 8, False, generator),
        random_basis(4, 16, 1, 8, True, generator),
    ):
        with pytest.raises(AdapterError, match="layer 1, side 'k'"):
            replace(bases, layers={0: bases.layers[0], 1: {"k": other}})
    with pytest.raises(AdapterError, match="no layer"):
        Bases({})
    with pytest.raises(AdapterError, match="rope"):
        replace(bases, rope="during")


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centred", [True, False])
def test_round_trip(model, tmp_path, dtype, centred):
    bases = random_bases(model, centred=centred, rope="post").to(dtype)
    bases.save(tmp_path, model)
    assert_same_bases(bases, Bases.load(tmp_path), dtype)


def test_one_side_may_be_missing(model, tmp_path):
    full = random_bases(model)
    bases = replace(full, layers={1: {"v": full.of(1, "v")}})
    loaded = Bases.load(bases.save(tmp_path, model))
    assert_same_bases(bases, loaded)
    assert loaded.ranks == {1: {"v": 11}}


@pytest.mark.parametrize("arch", FAMILIES)
def test_files_have_the_names_that_the_model_has(arch, tmp_path):
    model = model_of(arch)
    bases = random_bases(model)
    with_model = load_file(bases.save(tmp_path / "with", model) / TENSORS)
    without = load_file(bases.save(tmp_path / "without") / TENSORS)
    assert with_model.keys() == without.keys()
    names = {name for name, _ in model.named_modules()}
    for name in with_model:
        path = name.removeprefix("base_model.model.").split(".kv_lowrank.")[0]
        assert path in names


def test_saving_again_replaces_and_leaves_nothing_behind(bases, model, saved):
    shorter = bases.truncated(3)
    shorter.save(saved, model)
    assert_same_bases(shorter, Bases.load(saved))
    assert {file.name for file in saved.iterdir()} == {CONFIG, TENSORS, "README.md"}


def test_a_failed_save_keeps_the_old_adapter(bases, model, saved, monkeypatch):
    from hf_kvcache.adapters import files

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        bases.truncated(3).save(saved, model)
    assert_same_bases(bases, Bases.load(saved))
    assert {file.name for file in saved.iterdir()} == {CONFIG, TENSORS, "README.md"}


def test_a_save_that_dies_half_way_leaves_no_mixture(bases, model, saved, monkeypatch):
    import os

    move = os.replace

    def die(source, target):
        if target.name == CONFIG:
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        # same shapes: only the fingerprint in the config tells the two apart
        random_bases(model, seed=1).save(saved, model)
    with pytest.raises(AdapterError, match="adapter_config.json is missing"):
        Bases.load(saved)


def test_files_are_as_readable_as_others(saved):
    (saved / "other").touch()
    modes = {file.name: file.stat().st_mode for file in saved.iterdir()}
    assert modes[CONFIG] == modes[TENSORS] == modes["other"]


def test_neither_import_nor_files_need_peft(saved):
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import hf_kvcache, hf_kvcache.adapters as adapters\n"
        f"bases = adapters.Bases.load({str(saved)!r}); bases.save({str(saved)!r})\n"
        "from hf_kvcache.adapters.decompose import decompose\n"
        "print(bases.ranks)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{0: {'k': 8, 'v': 12}, 1: {'k': 7, 'v': 11}}"


def rewrite(folder, drop=(), **more):
    tensors = {name: t for name, t in load_file(folder / TENSORS).items() if name not in drop} | more
    save_file(tensors, folder / TENSORS)


def reword(folder, **fields):
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(config))


PREFIX = "base_model.model.model.layers.0.self_attn.kv_lowrank.kv_lowrank_"
SQUARE = torch.zeros(2, 16, 8)
HOSTILE = {
    "no config": (lambda f: (f / CONFIG).unlink(), "adapter_config.json is missing"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "safetensors is missing"),
    "pickle": (lambda f: (f / TENSORS).rename(f / "adapter_model.bin"), "pickled"),
    "pickle in disguise": (lambda f: torch.save({}, f / TENSORS), "no safetensors file"),
    "empty tensors": (lambda f: (f / TENSORS).write_bytes(b""), "no safetensors file"),
    "truncated": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-9]), "no safetensors file"),
    "no json": (lambda f: (f / CONFIG).write_text("{"), "damaged"),
    "binary": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "damaged"),
    "deep json": (lambda f: (f / CONFIG).write_text("[" * 100_000), "damaged"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "peft_type None"),
    "a LoRA": (lambda f: reword(f, peft_type="LORA"), "peft_type 'LORA'"),
    "a later version": (lambda f: reword(f, format_version=2), "format_version 2"),
    "no version": (lambda f: reword(f, format_version=None), "format_version None"),
    "no ranks": (lambda f: reword(f, ranks_k=None), "ranks_k"),
    "ranks of text": (lambda f: reword(f, ranks_k=["8", 7]), "ranks_k"),
    "ranks of truth": (lambda f: reword(f, ranks_k=[True, 7]), "ranks_k"),
    "negative rank": (lambda f: reword(f, ranks_k=[-8, 7]), "ranks_k"),
    "too large a rank": (lambda f: reword(f, ranks_k=[17, 7]), "ranks_k"),
    "ranks of no layer": (lambda f: reword(f, ranks_k=[None] * 2, ranks_v=[None] * 2), "neither ranks_k nor ranks_v"),
    "ranks of other lengths": (lambda f: reword(f, ranks_k=[8]), "different numbers of layers"),
    "no heads": (lambda f: reword(f, n_kv_heads=0), "n_kv_heads"),
    "groups of three": (lambda f: reword(f, group_size_k=3), "group_size_k"),
    "unknown rope": (lambda f: reword(f, rope="nope"), "rope"),
    "a mean of sorts": (lambda f: reword(f, has_mean_k=1), "has_mean_k"),
    "a cache with a path": (lambda f: reword(f, cache_class="os.system"), "cache_class"),
    "budget of text": (lambda f: reword(f, budget="all"), "budget"),
    "missing tensor": (lambda f: rewrite(f, drop=[PREFIX + "k_down"]), "down tensor of the keys of layer 0 is missing"),
    "missing mean": (lambda f: reword(f, has_mean_v=False), "not among the tensors"),
    "another layer": (
        lambda f: rewrite(f, **{PREFIX.replace("0", "7") + "k_down": SQUARE}),
        "not among the tensors",
    ),
    "foreign tensor": (lambda f: rewrite(f, **{"base_model.model.lm_head.weight": SQUARE}), "no name"),
    "path in a name": (lambda f: rewrite(f, **{f"base_model.model.../../x/{PREFIX}k_up": SQUARE}), "no name"),
    "same layer twice": (
        lambda f: rewrite(f, **{PREFIX.replace("model.layers", "other.layers") + "k_down": SQUARE}),
        "same layer|different models",
    ),
    "another model's names": (
        lambda f: rewrite(
            f, drop=[PREFIX + "k_down"], **{PREFIX.replace("self_attn", "attn") + "k_down": torch.zeros(2, 16, 8)}
        ),
        "different models",
    ),
    "wrong shape": (lambda f: rewrite(f, **{PREFIX + "k_down": SQUARE[:1]}), "of shape"),
    "wrong dtype": (lambda f: rewrite(f, **{PREFIX + "k_down": SQUARE.long()}), "I64"),
    "NaN": (lambda f: rewrite(f, **{PREFIX + "k_down": SQUARE * torch.nan}), "NaN"),
    "infinity": (lambda f: rewrite(f, **{PREFIX + "k_down": SQUARE + torch.inf}), "infinity"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_and_damaged_files_are_refused(saved, case):
    spoil, message = HOSTILE[case]
    Bases.load(saved)
    spoil(saved)
    with pytest.raises(AdapterError, match=message):
        Bases.load(saved)


@pytest.mark.parametrize("source", ["/nowhere/at/all", "../up", "a/../b", "a/b/c", "~/x", "name/..", "", "a b"])
def test_what_is_neither_folder_nor_repository_raises(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError):
        Bases.load(source)


def test_the_hub_is_asked_for_two_files(saved, bases, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repo, name, **more):
        asked.append((repo, name, more))
        return str(saved / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_same_bases(bases, Bases.load("someone/some-adapter", revision="main"))
    assert asked == [("someone/some-adapter", name, {"revision": "main"}) for name in (CONFIG, TENSORS)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_is_saved_that_would_be_refused(bases, tmp_path, value):
    basis = replace(bases.of(0, "k"), mean=torch.full((2, 16), value))
    with pytest.raises(AdapterError, match="NaN"):
        replace(bases, layers=bases.layers | {0: {"k": basis, "v": bases.of(0, "v")}}).save(tmp_path)
    assert not list(tmp_path.iterdir())


# -- models ------------------------------------------------------------------------------------------------------------


def test_they_fit_their_model_in_every_dtype(bases):
    for dtype in (torch.float32, torch.bfloat16):
        bases.check_model(model_of("llama", dtype))
    for attention in attentions(model_of("llama")).values():
        bases.check_model(attention.module)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: model_of("llama", seed=1), "weights"),
        (lambda: model_of("mistral"), "attention: the adapter is for LlamaAttention"),
        (lambda: model_of("gemma2"), "layers: the adapter is for 2, the model has 4"),
        (lambda: torch.nn.Linear(2, 2), "no attention modules"),
    ],
)
def test_other_models_are_refused(bases, other, message):
    with pytest.raises(AdapterError, match=message):
        bases.check_model(other())


def test_all_shapes_that_differ_are_named(bases, model):
    from cases import ARCHITECTURES, new_model

    config = ARCHITECTURES["llama"]()
    config.num_key_value_heads, config.head_dim = 1, 8
    with pytest.raises(AdapterError, match="KV heads: the adapter is for 2, the model has 1; head size.* 16.* 8"):
        bases.check_model(new_model(config, "sdpa"))
    single = next(iter(attentions(new_model(config, "sdpa")).values())).module
    with pytest.raises(AdapterError, match="KV heads"):
        bases.check_model(single)


def test_a_window_is_no_place_for_a_basis(bases):
    unnamed = replace(bases, fingerprint=None)
    with pytest.raises(AdapterError, match=r"\[0, 1\] are not plain full attention"):
        unnamed.check_model(model_of("mistral-window8"))
    with pytest.raises(AdapterError, match=r"\[0\] are not plain full attention"):
        unnamed.check_model(model_of("gemma3"))


def test_bases_of_no_model_fit_every_one_of_their_shapes(bases):
    unnamed = replace(bases, fingerprint=None)
    unnamed.check_model(model_of("llama", seed=1))
    unnamed.check_model(model_of("mistral"))
    bases.check_model(model_of("llama", seed=1), weights=False)


def test_the_digest_ignores_adapters_and_nothing_else():
    from peft import LoraConfig, get_peft_model

    from hf_kvcache.adapters import attach

    model = model_of("llama")
    module = attentions(model)[0].module
    plain = weights_digest(module)
    attach(model, random_bases(model), "kv")
    assert weights_digest(module) == plain
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj", "k_proj"]), adapter_name="style")
    assert weights_digest(module) == plain
    with torch.no_grad():
        lora.base_model.model.model.layers[0].self_attn.k_proj.base_layer.weight[0, 0] += 1
    assert weights_digest(module) != plain


def test_the_digest_is_that_of_saved_caches(model):
    """Caches saved before there were adapters must still be recognised."""
    from hf_kvcache.fingerprint import fingerprint

    module = attentions(model)[0].module
    assert weights_digest(module) == fingerprint(module)["weights"]
