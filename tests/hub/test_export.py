"""Exported repositories of the embedded model, loaded where hf_kvcache, PEFT and Triton cannot be found."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rooms import is_whole, telling
from safetensors.torch import load_file, save_file
from stand_in import serve
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

import hf_kvcache as kv
from hf_kvcache import compat
from hf_kvcache.adapters import AdapterError, Bases, attach
from hf_kvcache.attention import interface
from hf_kvcache.cli import main
from hf_kvcache.codecs.basis import Basis
from hf_kvcache.dmc import Settings, load, retrofit, retrofits
from hf_kvcache.hub.export import export, export_generate
from hf_kvcache.hub.modeling_mixin import CacheModel
from hf_kvcache.hub.spec import cache_of, spec_of
from hf_kvcache.kernels import use_backend
from hf_kvcache.models import embedded_heads, embedded_model

DTYPES = ("float32", "bfloat16")
# bytes of code; low rank has kernels and the model's RoPE beside the rest, DMC pages, hooks, and what trains it
LIMITS = {"quant": 260, "mustafar": 260, "palu": 330, "palu4": 355, "locret": 260, "dmc": 420, "dms": 420, "kv": 285}


def plain(dtype="bfloat16"):
    return AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=getattr(torch, dtype)).eval()


def bases(config):
    """Of random orthogonal directions around a mean, as calibration gives them."""
    generator, layers = torch.Generator().manual_seed(0), {}
    for i in range(config.num_hidden_layers):
        for side in "kv":
            draw = torch.randn(config.num_key_value_heads, config.head_dim, config.head_dim, generator=generator)
            q = torch.linalg.qr(draw)[0][..., : config.head_dim // 2]
            mean = torch.randn(config.num_key_value_heads, config.head_dim, generator=generator) / 8
            layers.setdefault(i, {})[side] = Basis(q, q.transpose(1, 2).unsqueeze(1).contiguous(), mean)
    return Bases(layers=layers, rope="pre")


def with_bases(model):
    attach(model, bases(model.config))
    return model


def with_heads(model):
    attach(model, embedded_heads())
    return model


def retrofitted(method, **knobs):
    def make(model):
        retrofit(model, Settings(**dict(method=method, decision="linear", offset=0.5, scale=5.0, window=8) | knobs))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for child in retrofits(model).values():
                for rows in child.rows():
                    if rows is not None:
                        rows.copy_(torch.randn(rows.shape, generator=generator) * 0.1)
        return model

    return make


FAMILIES = {
    "quant": (lambda model: model, lambda: kv.QuantCache(4)),
    "mustafar": (lambda model: model, lambda: kv.SparseCache(0.5)),
    "palu": (with_bases, lambda: kv.LowRankCache()),
    "palu4": (with_bases, lambda: kv.LowRankCache(bits=4)),
    "locret": (with_heads, lambda: kv.LocretCache(budget=128)),
    "dmc": (retrofitted("dmc"), kv.DMCCache),
    "dms": (retrofitted("dms"), kv.DMSCache),
    "kv": (lambda model: model, lambda: kv.QuantCache(8, policy=kv.KeyDiff(budget=160), window=32)),
}
# those that every run exports
SHORT = ("quant", "palu")


@pytest.fixture(autouse=True)
def attention_functions():
    """Repositories that are loaded here wrap them, and other tests look at what is wrapped."""
    before = compat.attention_functions()
    yield
    for name, function in before.items():
        compat.register_attention(name, function)


@pytest.fixture(scope="module")
def inputs():
    """Two prompts of different lengths, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model(), padding_side="left")
    texts = ["The sea was calm that night, and nobody spoke of the storm. " * 14, "He went home to the village. " * 22]
    return dict(tokenizer(texts, return_tensors="pt", padding=True))


def families(config):
    """Names of those that a run exports."""
    return tuple(FAMILIES) if is_whole(config) else SHORT


@pytest.fixture(scope="module")
def repositories(tmp_path_factory, pytestconfig):
    root = tmp_path_factory.mktemp("exported")
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    for name in families(pytestconfig):
        prepare, make = FAMILIES[name]
        export(prepare(plain()), make(), root / name, tokenizer=tokenizer)
    return root


@pytest.fixture(scope="module")
def answers(repositories, inputs, tmp_path_factory, pytestconfig):
    """What a process that does not have the library finds."""
    work = tmp_path_factory.mktemp("bare")
    given = {name: t.tolist() for name, t in inputs.items()}
    jobs = {
        f"{name} {dtype}": {"where": str(repositories / name), "dtype": dtype, "inputs": given}
        for name in families(pytestconfig)
        for dtype in DTYPES
    }
    jobs["quant float32"] |= {"thoroughly": True}
    for name in {"dmc", "dms"} & {*families(pytestconfig)}:
        jobs[f"{name} float32"] |= {"scores": True}
    hub = {"someone/quant": repositories / "quant", "someone/palu": repositories / "palu"}
    for name in list(hub):
        jobs[name] = {"where": name, "dtype": "float32", "inputs": given, "text": "The sea was calm"}
    hub["someone/generate"] = export_generate(FAMILIES["quant"][1](), work / "generate")
    for where in ("someone/generate", str(work / "generate")):
        custom = {"where": str(embedded_model()), "dtype": "float32", "inputs": given, "custom": where}
        jobs[f"custom generate {len(jobs)}"] = custom
    (work / "jobs.json").write_text(json.dumps({"work": str(work), "repositories": jobs}))
    with serve(hub) as address:
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(work / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, str(Path(__file__).with_name("bare.py")), str(work / "jobs.json")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=work)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    return {name: answer for line in lines for name, answer in json.loads(line.removeprefix("ANSWER ")).items()}


def expected(name, dtype, inputs):
    """Tokens and bytes of the library, in plain PyTorch as without a compiler."""
    prepare, make = FAMILIES[name]
    model, cache = prepare(plain(dtype)), make()
    with use_backend("reference"):
        out = model.generate(**inputs, **compat.cache_argument(cache), max_new_tokens=12, do_sample=False)
    return out.tolist(), cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", telling(FAMILIES, *SHORT))
def test_tokens_and_bytes_are_those_of_the_library(answers, inputs, name, dtype):
    answer = answers[f"{name} {dtype}"]
    tokens, cache = expected(name, dtype, inputs)
    assert answer["tokens"] == tokens
    assert (answer["nbytes"], answer["nbytes_dense"]) == (cache.nbytes, cache.nbytes_dense)
    assert answer["copied"] == answer["nbytes"]
    assert answer["cache"] == "KVCache" and answer["nbytes"] < 0.9 * answer["nbytes_dense"]
    assert answer["warnings"] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", telling(FAMILIES, *SHORT))
def test_a_cache_that_is_given_is_used_under_either_name(answers, name, dtype):
    ways = answers[f"{name} {dtype}"]["ways"]
    assert ways.pop("forward") == ["KVCache", None]
    assert {what: found for what, (found, _) in ways.items()} == dict.fromkeys(ways, True)
    # the last token is not in it; of two, the one under the newest name is used
    assert {what: n for what, (_, n) in ways.items() if n} == {"generate cache": 2, "generate past_key_values": 2}
    assert ways.keys() >= {"forward cache", "forward past_key_values", "forward by place", "forward both"}


def test_everything_that_transformers_does_with_a_model(answers):
    answer = answers["quant float32"]
    assert answer["class"] == "QuantLlamaForCausalLM"
    assert answer["cache of AutoModel"] == "KVCache"
    assert answer["rows of beams"] == 2
    assert answer["does without"].startswith("persist is a part of hf_kvcache that this repository does without")
    assert answer["saved again"] == answer["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dmc", "dms"])
def test_retrofits_read_whole_texts_and_can_be_trained_on(answers, inputs, name):
    with torch.no_grad():
        # with the weights that were exported
        model = FAMILIES[name][0](plain()).float()
        hard = model(**inputs, use_cache=False).logits[:, -1]
        relaxed = model.train()(**inputs, use_cache=False).logits[:, -1]
    answer = answers[f"{name} float32"]
    assert answer["scores"] == hard.tolist() and answer["relaxed"] == relaxed.tolist() != answer["scores"]


@pytest.mark.parametrize("name", ["quant", "palu"])
def test_from_the_hub(answers, name):
    local, hub = answers[f"{name} float32"], answers[f"someone/{name}"]
    assert (hub["tokens"], hub["nbytes"]) == (local["tokens"], local["nbytes"])
    assert hub["text"].startswith("The sea was calm") and len(hub["text"]) > len("The sea was calm")


def test_custom_generate_for_any_model(answers):
    of_model, found = answers["quant float32"], [a for name, a in answers.items() if name.startswith("custom")]
    assert len(found) == 2
    for answer in found:
        assert answer["class"] == "LlamaForCausalLM"
        assert (answer["tokens"], answer["nbytes"]) == (of_model["tokens"], of_model["nbytes"])
        assert answer["goes on"] == dict.fromkeys(("cache", "past_key_values"), [True, answer["nbytes"]])


def test_latents_that_a_cache_fits_itself_need_nothing_of_the_model(inputs, tmp_path):
    where, options = (
        export_generate(kv.LowRankCache(0.5), tmp_path / "fitted"),
        dict(max_new_tokens=12, do_sample=False),
    )
    model = plain("float32")
    found = model.generate(**inputs, custom_generate=str(where), trust_remote_code=True, **options)
    with use_backend("reference"):
        ours = model.generate(**inputs, **compat.cache_argument(kv.LowRankCache(0.5)), **options)
    assert found.tolist() == ours.tolist()


@pytest.mark.parametrize("make", [kv.DMCCache, lambda: kv.LocretCache(budget=256)])
def test_custom_generate_needs_a_method_of_the_cache_alone(tmp_path, make):
    with pytest.raises(ValueError, match="goes by what a model carries"):
        export_generate(make(), tmp_path / "out")


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["export", "--method", "quant:bits=4", "--out", out, "--license", "mit"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Made by `hf-kvcache export --method quant:bits=4 --out out --license mit`." in card
    assert "license: mit" in card and "| bytes after 1,056 tokens |" in card
    assert main(["export", "--method", "mustafar:sparsity=0.5", "--out", out, "--no-measure"]) == 0
    assert "--no-measure" in (tmp_path / "out" / "README.md").read_text()
    # nothing of the first export is left
    assert not list((tmp_path / "out").glob("*quant_llama.py")) and list((tmp_path / "out").glob("*mustafar_llama.py"))
    assert main(["export", "--method", "keydiff:budget=64", "--any-model", "--out", out]) == 0
    assert (tmp_path / "out" / "custom_generate" / "generate.py").exists()
    capsys.readouterr()
    for spec, message in (
        ("palu", "calibrate lowrank"),
        ("dynamic", "transformers' own"),
        ("nothing", "no cache is called"),
    ):
        assert main(["export", "--method", spec, "--out", str(tmp_path / "no")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", telling(FAMILIES, *SHORT))
def test_without_trust_nothing_is_loaded(answers, name):
    # transformers' own message
    assert "trust_remote_code=True" in answers[f"{name} float32"]["without trust"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dmc", "dms"])
def test_the_library_loads_retrofits_without_their_code(repositories, inputs, name):
    model = load(repositories / name, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("hf_kvcache.")
    with use_backend("reference"):
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False).tolist()
    assert tokens == expected(name, "float32", inputs)[0]


def test_what_a_base_model_keeps_in_float32_stays_so():
    class Base:
        _keep_in_fp32_modules_strict = {"router"}

    class Exported(CacheModel, Base):
        pass

    assert Exported._keep_in_fp32_modules_strict == {"kv_lowrank", "kv_retain", "router"}
    assert Base._keep_in_fp32_modules_strict == {"router"}


@pytest.mark.slow
def test_the_library_takes_the_cache_that_was_exported(tmp_path):
    cache = kv.DMSCache(kv.Quantize(8, axis="token"))
    export(retrofitted("dms")(plain()), cache, tmp_path)
    assert spec_of(load(tmp_path).new_cache()) == spec_of(cache) != spec_of(kv.DMSCache())


@pytest.mark.parametrize("name", telling(FAMILIES, *SHORT))
def test_files_are_clean_and_need_nothing_else(repositories, name):
    files = sorted((repositories / name).glob("*.py"))
    if name == "palu":
        files += sorted(export_generate(kv.LowRankCache(0.5), repositories / "generate").rglob("*.py"))
    ruff = [sys.executable, "-m", "ruff", "check", "--config", str(Path(__file__).parents[2] / "pyproject.toml")]
    # imports stand where they stand in the library, under other names
    ruff += ["--extend-ignore", "I001"]
    done = subprocess.run([*ruff, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    allowed = {*sys.stdlib_module_names, "torch", "transformers", "triton"}
    for file in files:
        source = file.read_text()
        assert source.startswith("# SPDX-License-Identifier: Apache-2.0\n"), file.name
        for node in ast.walk(ast.parse(source)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {module.partition(".")[0] for module in modules} <= allowed, file.name
    assert sum(file.stat().st_size for file in files if file.parent.name == name) < LIMITS[name] * 1000


@pytest.mark.parametrize("name", ["quant", "palu"])
def test_beside_the_library(repositories, inputs, name):
    # both register themselves with the attention functions of transformers
    before, _ = expected(name, "float32", inputs)
    model = AutoModelForCausalLM.from_pretrained(repositories / name, trust_remote_code=True, dtype=torch.float32)
    with use_backend("reference"):
        ours = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    assert not isinstance(compat.given_cache(ours), kv.KVCache)
    assert ours.sequences.tolist() == before == expected(name, "float32", inputs)[0]
    # the name is the library's, whose retrofits would not be known to another one
    assert AttentionInterface()["hf_kvcache"] is interface.kv_attention


@pytest.mark.parametrize("name", telling(["palu", "locret", "dmc"], "palu"))
def test_layers_on_disk(repositories, inputs, tmp_path, name):
    # accelerate brings weights for the call of the module that has them
    where = {"model.layers.3": "disk"} | dict.fromkeys(
        ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", *(f"model.layers.{i}" for i in range(3))),
        "cpu",
    )
    more = dict(trust_remote_code=True, dtype=torch.float32, device_map=where, offload_folder=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(repositories / name, **more)
    out = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)
    assert out.tolist() == expected(name, "float32", inputs)[0]


def test_what_is_missing_is_named(repositories, tmp_path):
    broken = shutil.copytree(repositories / "palu", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    gone = {name: t for name, t in weights.items() if ".kv_lowrank.k_down" not in name}
    assert len(gone) < len(weights)
    save_file(gone, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 4 weights of its cache"):
        AutoModelForCausalLM.from_pretrained(broken, trust_remote_code=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kv_cache": None}, "does not describe a cache"),
        ({"kv_cache": {"codec": [{"codec": "os.system"}, {"codec": "Quantize"}]}}, "no codec is called 'os.system'"),
        ({"kv_cache": {"window": -1}}, "must not be negative"),
    ],
)
def test_a_damaged_config(repositories, tmp_path, change, message):
    broken = shutil.copytree(repositories / "quant", tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text()) | change
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(broken, trust_remote_code=True)


@pytest.mark.parametrize(
    "make, message",
    [
        (kv.LowRankCache, "calibrate lowrank"),
        (lambda: kv.LocretCache(budget=256), "retaining heads"),
        (kv.DMCCache, "not retrofitted for DMC"),
    ],
)
def test_a_model_that_lacks_what_its_cache_goes_by(tmp_path, make, message):
    with pytest.raises(AdapterError, match=message):
        export(plain(), make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_one_repository_cannot_carry(tmp_path):
    both = kv.KVCache(policy=kv.LocretCache(budget=256).policy, codec=kv.LowRank(0.5), window=32)
    with pytest.raises(AdapterError, match="carries one of them"):
        export(with_heads(plain()), both, tmp_path / "out")
    with pytest.raises(ValueError, match="goes with a machine"):
        export(plain(), kv.QuantCache(4, offloading=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_lines_of_the_card_run(repositories, capsys):
    (lines,) = re.findall(r"```python\n(.*?)```", (repositories / "quant" / "README.md").read_text(), re.DOTALL)
    assert '"this repository"' in lines
    exec(lines.replace('"this repository"', repr(str(repositories / "quant"))), names := {})
    assert names["cache"].get_seq_length() > 10 and str(names["cache"].nbytes) in capsys.readouterr().out


def test_room_to_grow_is_part_of_the_description():
    cache = cache_of(json.loads(json.dumps(spec_of(kv.QuantCache(4, max_length=500, n_sink=4)))))
    assert (cache.max_length, cache.n_sink, cache.window) == (500, 4, 64)
