"""The wheel holds what the tree holds, and works outside the tree."""

import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOTS = {"src/hf_kvcache": "hf_kvcache", "kernels": "hf_kvcache/kernels", "trainers": "hf_kvcache/trainers"}
JUNK = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info", ".*", "*.so")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built once from a copy of the tree: building must not leave anything in the tree."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in ("src", "kernels", "trainers"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=JUNK)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    out = copy / "dist"
    build = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(out)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = out.glob("*.whl")
    return copy, path


def test_wheel_holds_the_tree(wheel):
    copy, path = wheel
    packed = {name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name}
    expected = {
        f"{target}/{file.relative_to(copy / root).as_posix()}"
        for root, target in ROOTS.items()
        for file in (copy / root).rglob("*")
        if file.is_file()
    }
    assert expected - packed == set(), "missing from the wheel (packages and package_data in setup.cfg)"
    assert packed - expected == set()


def test_wheel_holds_every_kind_of_file(wheel):
    names = zipfile.ZipFile(wheel[1]).namelist()
    for wanted in (
        "hf_kvcache/kernels/__init__.py",
        "hf_kvcache/kernels/quant_pack/reference.py",
        "hf_kvcache/kernels/quant_pack/README.md",
        "hf_kvcache/kernels/dense_attention/native.cpp",
        "hf_kvcache/models/prose.txt",
        "hf_kvcache/models/small/config.json",
        "hf_kvcache/models/small/model.safetensors",
        "hf_kvcache/models/small/tokenizer.json",
        "hf_kvcache/trainers/pretrain_small.py",
    ):
        assert wanted in names, wanted
    for op in (ROOT / "kernels").iterdir():
        if op.is_dir() and (op / "__init__.py").exists():
            assert f"hf_kvcache/kernels/{op.name}/__init__.py" in names
    metadata = next(n for n in names if n.endswith("METADATA"))
    entry = next(n for n in names if n.endswith("entry_points.txt"))
    archive = zipfile.ZipFile(wheel[1])
    assert "Apache-2.0" in archive.read(metadata).decode().split("\n\n")[0]
    assert "hf-kvcache = hf_kvcache.cli:main" in archive.read(entry).decode()
    assert not [n for n in names if n.endswith(("LICENSE",)) and not n.startswith("hf_kvcache-")]


def test_wheel_works_outside_the_tree(wheel, tmp_path):
    zipfile.ZipFile(wheel[1]).extractall(tmp_path / "site")
    program = """
        import pkgutil, importlib, sys, warnings
        import hf_kvcache as kv
        assert kv.__file__.startswith(sys.argv[1]), kv.__file__
        for op in pkgutil.iter_modules(kv.kernels.__path__):
            if op.ispkg:
                module = importlib.import_module(f"hf_kvcache.kernels.{op.name}")
                assert module.__file__.startswith(sys.argv[1]), module.__file__
        import hf_kvcache.cli
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained(kv.embedded_model(), attn_implementation="hf_kvcache")
        words = AutoTokenizer.from_pretrained(kv.embedded_model())
        x = words("It was the best of times, it was the worst of times, it was the age of wisdom " * 8,
                  return_tensors="pt")
        cache = kv.QuantCache(4)
        out = model.generate(**x, past_key_values=cache, max_new_tokens=4, do_sample=False)
        assert cache.nbytes < cache.nbytes_dense, (cache.nbytes, cache.nbytes_dense)
        print("works")
    """
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_KVCACHE_BACKEND": "reference"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program), str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "works", done.stderr[-3000:]


def test_no_package_shadows_kernels():
    # run from the root of the tree, a `kernels` package would replace the one on PyPI and break transformers
    assert not (ROOT / "kernels" / "__init__.py").exists()
