"""Ops as kernel repositories: what `kernels` asks of their files, and what they compute where this library is not."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import RepoCard
from kernel_cases import CASES, WRONG
from kernel_hub import kernel_handler
from kernels import Metadata
from packaging.version import Version
from stand_in import serve

import hf_kvcache as kv
from hf_kvcache.cli import main
from hf_kvcache.hub.flatten import files_of
from hf_kvcache.hub.kernel_card import LIMITS
from hf_kvcache.hub.kernel_repo import VARIANT, WITH, build_kernel, check_built, exports, metadata_of, sources
from hf_kvcache.hub.push import TAKES_KERNELS
from hf_kvcache.hub.recipes import roots_of
from hf_kvcache.kernels import use_backend

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
OPS = sorted(WITH)
ON_TRITON = [op for op in OPS if (ROOT / "kernels" / op / "triton_kernel.py").exists()]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    assert main(["kernel", "all", "--out", str(folder)]) == 0
    return folder


def in_a_process(mode, built, out, ops):
    """What `bare_kernels.py` says of the repositories of some ops."""
    (built / "empty").mkdir(exist_ok=True)
    command = [sys.executable, str(HERE / "bare_kernels.py"), mode, str(built), str(out), *ops]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=environment, cwd=built / "empty", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out)


@pytest.fixture(scope="module")
def plain(built, tmp_path_factory):
    return in_a_process("plain", built, tmp_path_factory.mktemp("plain") / "answers.pt", OPS)


@pytest.fixture(scope="module")
def interpreted(built, tmp_path_factory):
    return in_a_process("interpreter", built, tmp_path_factory.mktemp("interpreted") / "answers.pt", ON_TRITON)


def of_the_library(op):
    """What a repository of this op offers, from the library."""
    return SimpleNamespace(**{name: getattr(import_module(module), name) for name, module in exports(op).items()})


def reference(op):
    with use_backend("reference"):
        return [x.clone() for x in CASES[op](of_the_library(op))]


def test_every_op_has_a_repository():
    """But for prompts, which is there for its C++: that stays in the library."""
    ops = {path.name for path in (ROOT / "kernels").iterdir() if (path / "__init__.py").exists()}
    assert OPS == sorted(ops - {"prompt_attention"})
    assert OPS == sorted(CASES) and {*OPS} - {"merge_states"} == {*WRONG}
    assert {*ON_TRITON} - {"merge_states"} == {*LIMITS}


@pytest.mark.parametrize("op", OPS)
def test_results_without_the_library(plain, op):
    for i, (ours, theirs) in enumerate(zip(plain[op]["results"], reference(op), strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, equal_nan=True, msg=lambda m, i=i: f"{i}: {m}")
    assert plain[op]["said"] == []


@pytest.mark.slow
@pytest.mark.parametrize("op", ON_TRITON)
def test_triton_kernels_as_they_are_shipped(interpreted, op):
    for i, (ours, theirs) in enumerate(zip(interpreted[op]["results"], reference(op), strict=True)):
        close = 3e-3 if theirs.is_floating_point() else 0
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close, msg=lambda m, i=i: f"{i}: {m}")


@pytest.mark.parametrize("op", OPS)
def test_signatures_docstrings_and_checks_are_those_of_the_library(plain, op):
    library, answer = of_the_library(op), plain[op]
    assert answer["all"] == sorted(vars(library))
    for name, found in answer["signatures"].items():
        assert found == str(signature(getattr(library, name))), name
    for name, found in answer["docs"].items():
        assert found == getattr(library, name).__doc__, name
    if op in WRONG:
        with pytest.raises(ValueError) as refused:
            WRONG[op](library)
        assert answer["refusal"] == f"ValueError: {refused.value}"


@pytest.mark.parametrize("op", OPS)
def test_metadata(built, plain, op):
    variant = built / op / VARIANT
    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert re.fullmatch("[a-z][-a-z0-9]*[a-z0-9]", str(metadata.name)) and metadata.name.python_name == op
    assert metadata.version == 1 and metadata.license == "apache-2.0" and metadata.python_depends == []
    assert metadata.id == plain[op]["id"] and metadata.id.isidentifier()
    # raises where a file is not what was hashed
    metadata.digest.validate(type(metadata.digest).hash_variant(metadata.digest.algorithm, variant))


@pytest.mark.parametrize("op", OPS)
def test_files_import_each_other_relatively(built, op):
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for file in (built / op / VARIANT).glob("*.py"):
        source = file.read_text()
        assert source.startswith("# SPDX-License-Identifier: Apache-2.0\n# hf_kvcache."), file.name
        for node in ast.walk(ast.parse(source)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {module.partition(".")[0] for module in modules} <= allowed, file.name


def test_linters_have_nothing_to_say(built):
    ruff, config = [sys.executable, "-m", "ruff"], ["--config", str(ROOT / "pyproject.toml"), str(built)]
    # imports stand where they stand in the library, under other names
    for command in (["check", "--extend-ignore", "I001"], ["format", "--check"]):
        done = subprocess.run([*ruff, *command, *config], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("op", OPS)
def test_card(built, op):
    card = RepoCard.load(built / op / "README.md", repo_type="kernel", ignore_metadata_errors=False)
    assert card.data.library_name == "kernels" and card.data.license == "apache-2.0"
    assert f"\ndef {op}(\n" in card.text or f"\ndef {op}(" in card.text
    assert f'get_local_kernel(Path("{op}"))' in card.text and "native.cpp" not in card.text
    assert all(f"`{name}`" in card.text for name in exports(op))
    assert ("## The packed integer format" in card.text) == ("quant_pack" in exports(op))


def test_builds_are_the_same_bytes_and_leave_nothing_behind(built, tmp_path):
    for op in ("quant_pack", "sparse_attention"):
        again = tmp_path / op / VARIANT
        again.mkdir(parents=True)
        (again / "of_an_earlier_build.py").touch()
        build_kernel(op, tmp_path)
        files = {path.name: path.read_bytes() for path in again.iterdir()}
        assert files == {path.name: path.read_bytes() for path in (built / op / VARIANT).iterdir() if path.is_file()}


def test_identifiers_follow_the_content():
    files = sources("merge_step", "0")
    changed = files | {"kernels.py": files["kernels.py"] + "\n"}
    renamed = {name.replace("kernels.py", "kernel.py"): text for name, text in files.items()}
    ids = [metadata_of("merge_step", each)["id"] for each in (files, changed, renamed, dict(reversed(files.items())))]
    assert len({*ids}) == 3 and ids[0] == ids[3]


def test_limits_are_those_of_the_kernels():
    """Samples of what cards say, asked of the library."""
    triton = {op: import_module(f"hf_kvcache.kernels.{op}.triton_kernel") for op in LIMITS}
    rows = {D: torch.empty(1, 1, 32, D, dtype=torch.float16) for D in (64, 72, 80, 256, 272)}
    dense = triton["dense_attention"].obstacle
    assert dense(rows[256], rows[64]) is None and dense(rows[272], rows[64]) and dense(rows[64], rows[272])
    for D, bits, fits in ((80, 4, True), (72, 4, False), (272, 4, False), (64, 3, False), (256, 8, True)):
        packed = torch.empty(1, 1, 32, D * bits // 16), torch.empty(1, 1, 32, 1), None
        why_not = triton["quant_attention"].obstacle(rows[D], packed, packed, (bits, bits), "channel")
        assert (why_not is None) == fits, (D, bits, why_not)
    assert triton["quant_pack"].obstacle(rows[64], 3, "token", 64) and not triton["quant_pack"].obstacle(
        rows[64], 2, "token", 64
    )
    assert triton["sparse_pack"].obstacle(rows[80], 40, "bitmap", 20, None)


def test_exported_models_reach_their_kernels():
    """The dispatcher asks every module whether it can run, and imports it by name."""
    files = files_of(roots_of(kv.DMCCache(), {"kind": "retrofit"}), "0")
    asked = {*re.findall(r'select\("(\w+)"', "".join(files.values()))}
    assert asked >= {"merge_step", "ragged_attention", "slot_step"}
    for op in asked:
        bound = {
            getattr(node, "asname", None) or node.name
            for node in ast.walk(ast.parse(files[f"kernels_{op}_triton_kernel.py"]))
            if isinstance(node, (ast.alias, ast.FunctionDef))
        }
        # the store calls nothing else of this op where Triton serves
        assert {"unavailable", "place_rows" if op == "slot_step" else op} <= bound, op


def test_an_unknown_op_is_a_mistake(capsys, tmp_path):
    assert main(["kernel", "quant_pack", "quant_unpack", "--out", str(tmp_path)]) == 2
    assert "no op is called 'quant_unpack'" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["__init__.py", "metadata.json", "README.md", "more.py"])
def test_what_was_not_built_like_that_is_not_sent(built, tmp_path, capsys, change):
    folder = shutil.copytree(built / "merge_step", tmp_path / "changed")
    check_built(folder)
    file = folder / change if change == "README.md" else folder / VARIANT / change
    if change in ("README.md", "metadata.json"):
        file.unlink()
    else:
        file.write_text("1 / 0\n")
    assert main(["push", str(folder), "someone/merge-step"]) == 2
    assert change in capsys.readouterr().err


def test_an_old_hub_library_is_named(built, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.__version__", "2.2.0")
    assert main(["push", str(built / "merge_step"), "someone/merge-step"]) == 2
    assert "huggingface_hub 2.3 or newer; this is 2.2.0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(Version(huggingface_hub.__version__) < Version(TAKES_KERNELS), reason="its uploads take no kernels")
def test_pushed_kernels_load_by_version(built, tmp_path):
    """The second upload takes the place of the first, on the branch of the version."""
    older = shutil.copytree(built / "slot_step", tmp_path / "older")
    root = tmp_path / "hub"
    with serve({}, root, kernel_handler) as address:
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(root / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, str(HERE / "pushing_kernels.py"), str(built / "merge_step"), str(older)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWER "))
    metadata = json.loads((built / "merge_step" / VARIANT / "metadata.json").read_text())
    expected = {"pushed": [0, 0], "id": metadata["id"], "all": ["merge_step"]}
    assert json.loads(line.removeprefix("ANSWER ")) == expected

    def files(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    arrived = root / "kernels" / "someone" / "merge-step"
    assert files(arrived / "v1") == files(built / "merge_step")
    assert files(arrived / "main") == {"README.md": (built / "merge_step" / "README.md").read_bytes()}
