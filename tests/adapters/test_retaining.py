"""Retaining heads of a whole model: what they say of themselves, their files, the authors' files, models they fit."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_bases import FAMILIES, model_of
from tiny_heads import assert_same_heads, formula, heads_of

from hf_kvcache.adapters import AdapterError, Bases, RetainingHeads
from hf_kvcache.adapters.modules import attached_heads, attentions, full_attentions
from hf_kvcache.adapters.scoring import score

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


@pytest.fixture(scope="module")
def heads(model):
    return heads_of(model, query_aware=True, n_query=8, defaults={"budget": 64, "stabilizers": 0})


@pytest.fixture
def saved(heads, model, tmp_path):
    return heads.save(tmp_path / "adapter", model)


# -- what they say -----------------------------------------------------------------------------------------------------


def test_they_say_what_they_are(heads):
    assert (heads.d_r, heads.feature_dim, heads.n_kv_heads, heads.n_layers) == (8, (4 + 2 * 2) * 16, 2, 2)
    assert heads.n_parameters == 2 * (8 * 128 + 2 * 8) and heads.nbytes == 4 * heads.n_parameters
    assert heads.to(torch.bfloat16).nbytes == 2 * heads.n_parameters
    assert heads.settings == {
        "activation": "silu",
        "feature_point": "projection",
        "target": "answer_max",
        "query_aware": True,
        "n_query": 8,
        "defaults": {"budget": 64, "stabilizers": 0},
    }


@pytest.mark.parametrize("arch", FAMILIES)
def test_new_heads_follow_the_model(arch):
    model = model_of(arch)
    heads = RetainingHeads.new(model, d_r=64, seed=3)
    assert heads.layers.keys() == full_attentions(model).keys()
    assert heads.feature_point == ("norm" if arch in ("qwen3", "gemma3") else "projection")
    assert heads.activation == ("gelu_pytorch_tanh" if "gemma" in arch else "silu")
    for fc1, fc2 in heads.layers.values():
        assert (fc1.shape, fc2.shape) == ((64, 128), (2, 64))
        assert abs(fc1.std() / model.config.initializer_range - 1) < 0.1 and fc1.mean().abs() < 1e-3
    assert_same_heads(heads, RetainingHeads.new(model, d_r=64, seed=3))
    assert not torch.equal(heads.tensors[1, "fc1"], RetainingHeads.new(model, d_r=64).tensors[1, "fc1"])


def test_layers_may_be_chosen():
    windowed = model_of("mistral-window8")
    with pytest.raises(AdapterError, match="no full-attention layers"):
        RetainingHeads.new(windowed)
    assert list(RetainingHeads.new(windowed, layers=[1]).layers) == [1]
    with pytest.raises(AdapterError, match=r"the model has 2, not \[5\]"):
        RetainingHeads.new(windowed, layers=[1, 5])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": {}}, "no layer"),
        ({"layers": {-1: (torch.zeros(8, 128), torch.zeros(2, 8))}}, "layers"),
        ({"layers": {0: (torch.zeros(8), torch.zeros(2, 8))}}, "no matrices"),
        ({"layers": {0: (torch.zeros(8, 128), torch.zeros(2, 9))}}, "fc2 of layer 0"),
        ({"layers": {0: (torch.zeros(8, 128, dtype=torch.int8), torch.zeros(2, 8))}}, "fc1 of layer 0 is torch.int8"),
        ({"activation": "os.system"}, "activation"),
        ({"activation": "prelu"}, "parameters of its own"),
        ({"feature_point": "rope"}, "feature_point"),
        ({"target": "luck"}, "target"),
        ({"n_query": 0}, "n_query"),
        ({"defaults": {"bits": 4}}, "not of bits"),
        ({"defaults": {"budget": -1}}, "default_budget"),
    ],
)
def test_heads_that_cannot_be_raise(heads, fields, message):
    with pytest.raises(AdapterError, match=message):
        replace(heads, **fields)


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_scores_are_the_formula(heads, activation):
    features = torch.randn(2, 37, 128, generator=torch.Generator().manual_seed(0))
    heads = replace(heads, activation=activation)
    for i in heads.layers:
        scores, expected = heads.scores(i, features), formula(features, *heads.layers[i], activation)
        assert scores.shape == (2, 2, 37) and scores.dtype == torch.float32
        assert (scores - expected).abs().max() < 1e-6 * max(1, expected.abs().max())


@pytest.mark.parametrize("autocast", [False, True])
def test_scores_of_bfloat16_are_not_rounded(heads, autocast):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 500, 128, generator=generator).bfloat16()
    fc1, fc2 = (t.bfloat16() for t in heads.layers[0])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = score(features, fc1, fc2)
    hidden = torch.nn.functional.silu((features @ fc1.T).float())
    assert scores.dtype == torch.float32
    assert (scores - (hidden @ fc2.float().T).mT).abs().max() < 1e-5
    assert scores.unique().numel() > 0.99 * scores.numel(), "rounded scores tie"


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2"])
def test_round_trip(arch, tmp_path, dtype):
    model = model_of(arch)
    heads = heads_of(model, target="reconstruction").to(dtype)
    heads.save(tmp_path, model)
    assert_same_heads(heads, RetainingHeads.load(tmp_path), dtype)
    assert {file.name for file in tmp_path.iterdir()} == {CONFIG, TENSORS, "README.md"}


@pytest.mark.parametrize("arch", FAMILIES)
def test_files_have_the_names_that_the_model_has(arch, tmp_path):
    model = model_of(arch)
    heads = heads_of(model)
    with_model = load_file(heads.save(tmp_path / "with", model) / TENSORS)
    without = load_file(heads.save(tmp_path / "without") / TENSORS)
    assert with_model.keys() == without.keys()
    names = {name for name, _ in model.named_modules()}
    for name in with_model:
        path, part = name.removeprefix("base_model.model.").split(".kv_retain.kv_retain_")
        assert path in names and part in ("fc1", "fc2")


@pytest.mark.slow
def test_neither_import_nor_files_need_peft(saved):
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import hf_kvcache, hf_kvcache.adapters as adapters\n"
        f"heads = adapters.RetainingHeads.load({str(saved)!r}); heads.save({str(saved)!r})\n"
        "import torch; print(heads.d_r, tuple(heads.scores(0, torch.zeros(1, 3, 128)).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "8 (1, 2, 3)"


def rewrite(folder, drop=(), **more):
    tensors = {name: t for name, t in load_file(folder / TENSORS).items() if name not in drop} | more
    save_file(tensors, folder / TENSORS)


def reword(folder, **fields):
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(config))


PREFIX = "base_model.model.model.layers.0.self_attn.kv_retain.kv_retain_"
FC2 = torch.zeros(2, 8)
HOSTILE = {
    "no config": (lambda f: (f / CONFIG).unlink(), "adapter_config.json is missing"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "safetensors is missing"),
    "pickle": (lambda f: (f / TENSORS).rename(f / "adapter_model.bin"), "pickled"),
    "pickle in disguise": (lambda f: torch.save({}, f / TENSORS), "no safetensors file"),
    "truncated": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-9]), "no safetensors file"),
    "no json": (lambda f: (f / CONFIG).write_text("{"), "damaged"),
    "deep json": (lambda f: (f / CONFIG).write_text("[" * 100_000), "damaged"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "peft_type None"),
    "low-rank bases": (lambda f: reword(f, peft_type="KV_LOWRANK"), "peft_type 'KV_LOWRANK', an adapter of retaining"),
    "a later version": (lambda f: reword(f, format_version=2), "format_version 2"),
    "no layers": (lambda f: reword(f, layers=[]), "layers"),
    "one layer": (lambda f: reword(f, layers=[0]), "not among the tensors"),
    "three layers": (lambda f: reword(f, layers=[0, 1, 2]), "fc1 of layer 2 is missing"),
    "layers out of order": (lambda f: reword(f, layers=[1, 0]), "layers"),
    "layers twice": (lambda f: reword(f, layers=[0, 0, 1]), "layers"),
    "layers of truth": (lambda f: reword(f, layers=[False, True]), "layers"),
    "layers of text": (lambda f: reword(f, layers="01"), "layers"),
    "layers of numbers": (lambda f: reword(f, layers=[0.0, 1]), "layers"),
    "no size": (lambda f: reword(f, d_r=0), "d_r"),
    "an enormous size": (lambda f: reword(f, d_r=10**12), "d_r"),
    "another size": (lambda f: reword(f, d_r=9), "of shape"),
    "no features": (lambda f: reword(f, feature_dim=None), "feature_dim"),
    "heads of truth": (lambda f: reword(f, num_kv_heads=True), "num_kv_heads"),
    "a call for activation": (lambda f: reword(f, activation="__import__('os')"), "activation"),
    "a list for activation": (lambda f: reword(f, activation=["silu"]), "activation"),
    "unknown point": (lambda f: reword(f, feature_point={}), "feature_point"),
    "unknown target": (lambda f: reword(f, target=["answer_max"]), "target"),
    "aware of sorts": (lambda f: reword(f, query_aware=1), "query_aware"),
    "a query of text": (lambda f: reword(f, n_query="8"), "n_query"),
    "a chunk of half": (lambda f: reword(f, default_chunk=0.5), "default_chunk"),
    "fingerprint of text": (lambda f: reword(f, fingerprint="all"), "fingerprint"),
    "model of numbers": (lambda f: reword(f, base_model_name_or_path=7), "base_model_name_or_path"),
    "missing tensor": (lambda f: rewrite(f, drop=[PREFIX + "fc2"]), "fc2 of layer 0 is missing"),
    "foreign tensor": (lambda f: rewrite(f, **{"base_model.model.lm_head.weight": FC2}), "no name"),
    "another part": (lambda f: rewrite(f, **{PREFIX + "fc3": FC2}), "no name"),
    "path in a name": (lambda f: rewrite(f, **{f"base_model.model.../../x/{PREFIX}fc1": FC2}), "no name"),
    "wrong shape": (lambda f: rewrite(f, **{PREFIX + "fc2": FC2[:1]}), "of shape"),
    "wrong dtype": (lambda f: rewrite(f, **{PREFIX + "fc2": FC2.long()}), "I64"),
    "NaN": (lambda f: rewrite(f, **{PREFIX + "fc2": FC2 * torch.nan}), "NaN"),
    "infinity": (lambda f: rewrite(f, **{PREFIX + "fc2": FC2 + torch.inf}), "infinity"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_and_damaged_files_are_refused(saved, case):
    spoil, message = HOSTILE[case]
    RetainingHeads.load(saved)
    spoil(saved)
    with pytest.raises(AdapterError, match=message):
        RetainingHeads.load(saved)


@pytest.mark.parametrize("source", ["/nowhere/at/all", "../up", "a/b/c", ""])
def test_what_is_neither_folder_nor_repository_raises(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError):
        RetainingHeads.load(source)


def test_the_two_kinds_are_not_mistaken_for_each_other(saved):
    with pytest.raises(AdapterError, match="peft_type 'RETAINING_HEAD', a low-rank KV adapter is 'KV_LOWRANK'"):
        Bases.load(saved)


def test_nothing_is_saved_that_would_be_refused(heads, tmp_path):
    spoilt = heads.layers | {0: (heads.layers[0][0], FC2 + torch.inf)}
    with pytest.raises(AdapterError, match="infinity"):
        replace(heads, layers=spoilt).save(tmp_path)
    assert not list(tmp_path.iterdir())


# -- models ------------------------------------------------------------------------------------------------------------


def test_they_fit_their_model_in_every_dtype(heads):
    for dtype in (torch.float32, torch.bfloat16):
        heads.check_model(model_of("llama", dtype))
    for attention in attentions(model_of("llama")).values():
        heads.check_model(attention.module)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: model_of("llama", seed=1), "weights"),
        (lambda: model_of("mistral"), "attention: the adapter is for LlamaAttention"),
        (lambda: model_of("gemma2"), "layers: the adapter is for 2, the model has 4"),
        (lambda: torch.nn.Linear(2, 2), "no attention modules"),
    ],
)
def test_other_models_are_refused(heads, other, message):
    with pytest.raises(AdapterError, match=message):
        heads.check_model(other())


def test_all_shapes_that_differ_are_named(heads):
    from cases import ARCHITECTURES, new_model

    config = ARCHITECTURES["llama"]()
    config.num_key_value_heads = 1
    with pytest.raises(AdapterError, match="KV heads: the adapter is for 2, the model has 1; features: .* 128, .* 96"):
        heads.check_model(new_model(config, "sdpa"))


def test_heads_of_no_model_fit_every_one_of_their_shapes(heads):
    unnamed = replace(heads, fingerprint=None)
    unnamed.check_model(model_of("llama", seed=1))
    unnamed.check_model(model_of("qwen3"))
    unnamed.check_model(model_of("mistral-window8"))
    heads.check_model(model_of("llama", seed=1), weights=False)
    with pytest.raises(AdapterError, match=r"the model has 2, the adapter is for \[7\] beyond them"):
        replace(unnamed, layers={7: heads.layers[0]}).check_model(model_of("llama"))


def test_missing_projections_are_named(heads):
    model = model_of("llama")
    module = attentions(model)[1].module
    module.k_proj, module.v_proj = None, None
    with pytest.raises(AdapterError, match="LlamaAttention of layer 1 has no k_proj, v_proj"):
        replace(heads, fingerprint=None).check_model(model)
    with pytest.raises(AdapterError, match="layer 0 has no q_norm, k_norm"):
        replace(heads, feature_point="norm").check_model(model_of("llama"))


def test_there_is_nothing_without_heads(model):
    assert attached_heads(attentions(model)[0].module) is None
    with pytest.raises(AdapterError, match="carries no retaining heads"):
        RetainingHeads.of(model)


# -- the authors' files ------------------------------------------------------------------------------------------------


def upstream(heads, dtype=torch.bfloat16):
    names = {(i, part): f"model.layers.{i}.self_attn.{part}.weight" for i, part in heads.tensors}
    return {names[place]: t.to(dtype) for place, t in heads.tensors.items()}


NOISE = {"model.layers.0.mlp.fc1.weight": torch.zeros(3), "model.embed_tokens.weight": torch.zeros(4, 2)}


def one_file(tensors, folder):
    save_file(tensors | NOISE, folder / "heads.safetensors")
    return folder / "heads.safetensors"


def shards(tensors, folder):
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:1]}, folder / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[1:]} | NOISE, folder / "model-00002-of-00002.safetensors")
    index = {"weight_map": {name: "../../etc/passwd" for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "pytorch_model.bin").write_bytes(b"never opened beside safetensors")
    return folder


def pickled(tensors, folder):
    torch.save(tensors | NOISE | {"step": 3000}, folder / "pytorch_model.bin")
    torch.save(object, folder / "training_args.bin")
    return folder


def old_pickle(tensors, folder):
    torch.save(tensors, folder / "fc.bin", _use_new_zipfile_serialization=False)
    return folder / "fc.bin"


@pytest.mark.parametrize("write", [one_file, shards, pickled, old_pickle])
@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_the_authors_files_are_imported(arch, write, tmp_path):
    model = model_of(arch)
    heads = heads_of(model)
    imported = RetainingHeads.from_upstream(write(upstream(heads), tmp_path), model)
    assert_same_heads(
        replace(heads, defaults={"stabilizers": 2500, "local": 100}, base_model=imported.base_model),
        imported,
        torch.bfloat16,
    )
    assert RetainingHeads.load(imported.save(tmp_path / "ours", model)).config() == imported.config()


def test_what_the_authors_did_may_be_overridden(model, heads, tmp_path):
    path = one_file(upstream(heads), tmp_path)
    made = RetainingHeads.from_upstream(path, model, query_aware=True, n_query=4, defaults={"budget": 6000})
    assert made.query_aware and made.n_query == 4 and made.defaults == {"budget": 6000}


class Evil:
    def __reduce__(self):
        return print, ("pwned",)


UPSTREAM = {
    "nothing": (lambda t, f: f / "none.safetensors", "no .safetensors"),
    "an empty folder": (lambda t, f: f, "neither"),
    "another suffix": (lambda t, f: (one_file(t, f)).rename(f / "x.json"), "no .safetensors"),
    "no heads": (lambda t, f: one_file({}, f), "has no model.layers.0.self_attn.fc1.weight"),
    "a matrix short": (
        lambda t, f: one_file({k: v for k, v in t.items() if "1.self_attn.fc2" not in k}, f),
        "has no model.layers.1.self_attn.fc2.weight",
    ),
    "a layer short": (
        lambda t, f: one_file({k: v for k, v in t.items() if "layers.1" not in k}, f),
        r"no heads of layers \[1\]",
    ),
    "a layer more": (
        lambda t, f: one_file(t | {k.replace("layers.1", "layers.9"): v.clone() for k, v in t.items()}, f),
        r"\[9\] beyond",
    ),
    "a bias": (lambda t, f: one_file(t | {"model.layers.0.self_attn.fc1.bias": torch.zeros(8)}, f), "bias"),
    "another model's": (
        lambda t, f: one_file({k: v[:, :-1].contiguous() if "fc1" in k else v for k, v in t.items()}, f),
        "features",
    ),
    "NaN": (lambda t, f: one_file({k: v * torch.nan for k, v in t.items()}, f), "NaN"),
    "integers": (lambda t, f: one_file({k: v.int() for k, v in t.items()}, f), "not floating point"),
    "twice": (lambda t, f: [save_file(t, f / f"{i}.safetensors") for i in range(2)] and f, "already"),
    "truncated": (lambda t, f: cut(one_file(t, f)), "damaged"),
    "a truncated pickle": (lambda t, f: cut(pickled(t, f) / "pytorch_model.bin"), "damaged"),
    "a hostile pickle": (lambda t, f: torch.save({"fc": Evil()}, f / "x.bin") or f / "x.bin", "more than tensors"),
    "a list": (lambda t, f: torch.save(list(t.values()), f / "x.bin") or f / "x.bin", "a list, not"),
    "no pickle at all": (lambda t, f: [(f / "x.bin").write_bytes(b"")] and f / "x.bin", "damaged"),
}


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])
    return path


@pytest.mark.parametrize("case", UPSTREAM)
def test_other_files_than_the_authors_are_refused(model, heads, tmp_path, capfd, case):
    write, message = UPSTREAM[case]
    path = write(upstream(heads), tmp_path)
    with pytest.raises(AdapterError, match=message):
        RetainingHeads.from_upstream(path, model)
    assert "pwned" not in capfd.readouterr().out
