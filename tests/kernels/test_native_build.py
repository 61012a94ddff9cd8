"""Building and caching of the C++ backend, and what happens without a compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_kvcache.kernels.dense_attention  # noqa: F401
import hf_kvcache.kernels.quant_attention  # noqa: F401
import hf_kvcache.kernels.quant_pack  # noqa: F401
from hf_kvcache.kernels import BackendUnavailable, choose, native, use_backend
from hf_kvcache.kernels.dense_attention import dense_attention

CPU = torch.device("cpu")
OP = "dense_attention"  # the quickest to compile
needs_compiler = pytest.mark.skipif(native.why_no_compiler() is not None, reason="no C++ compiler")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder and no memory of earlier builds."""
    monkeypatch.setenv("HF_KVCACHE_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_KVCACHE_ISA", "scalar")
    native.forget()
    yield tmp_path
    native.forget()


def operands():
    torch.manual_seed(0)
    return torch.randn(1, 4, 1, 64), torch.randn(1, 2, 50, 64), torch.randn(1, 2, 50, 64)


@needs_compiler
def test_a_library_is_built_once(fresh):
    library = native.build(OP)
    built = library.stat().st_mtime_ns
    assert native.build(OP) == library and library.stat().st_mtime_ns == built
    assert [path.name for path in fresh.iterdir()] == [library.name]


@needs_compiler
def test_levels_and_compilers_do_not_share_a_library(fresh, monkeypatch):
    names = {native.build(OP, isa).name for isa in native.supported()[-2:]}
    assert len(names) == len(native.supported()[-2:])


@needs_compiler
def test_two_processes_at_once(fresh):
    code = f"import hf_kvcache.kernels.{OP}; from hf_kvcache.kernels import native; print(native.build({OP!r}))"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=300)[0].strip() for process in running}
    assert all(process.returncode == 0 for process in running)
    assert len(paths) == 1 and Path(paths.pop()).exists()
    assert native.unavailable(OP, CPU) is None


@pytest.mark.parametrize("compiler", ["/nowhere/g++", "false"])
def test_a_broken_compiler_is_a_reason_and_the_reference_runs(fresh, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    reason = native.unavailable(OP, CPU)
    assert reason and compiler in reason
    assert choose(OP, CPU).backend == "reference" and choose(OP, CPU).reason == reason
    out, _ = dense_attention(*operands(), scaling=0.1)
    with use_backend("reference"):
        assert torch.equal(out, dense_attention(*operands(), scaling=0.1)[0])
    with use_backend("native"), pytest.raises(BackendUnavailable, match="asked for"):
        dense_attention(*operands(), scaling=0.1)


@needs_compiler
def test_the_reason_holds_the_first_compiler_error(fresh, monkeypatch):
    wrapper = fresh / "cxx"
    wrapper.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x.cpp:1: error: planted" >&2\nexit 1\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    assert "error: planted" in native.unavailable(OP, CPU)


def test_an_unknown_level_is_refused_by_name(fresh, monkeypatch):
    monkeypatch.setenv("HF_KVCACHE_ISA", "neon9")
    assert "HF_KVCACHE_ISA='neon9'" in native.unavailable(OP, CPU)


def test_a_cache_that_cannot_be_written(fresh, monkeypatch):
    blocked = fresh / "file"
    blocked.write_text("")
    monkeypatch.setenv("HF_KVCACHE_CACHE", str(blocked / "inside"))
    folder = native.cache_folder()
    assert folder.is_dir() and os.access(folder, os.W_OK)


def test_other_devices_are_not_native():
    assert "meta" in native.unavailable(OP, torch.device("meta"))


@needs_compiler
@pytest.mark.parametrize("op", native.OPS)
def test_no_warnings(op, tmp_path):
    """Of our own: GCC 12 warns about its intrinsics (GCC bug 105593)."""
    source = Path(sys.modules[f"hf_kvcache.kernels.{op}"].__file__).with_name("native.cpp")
    command = [
        *native.compiler(),
        *native.FLAGS,
        *native.isa_flags(native.supported()[0]),
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    command += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-I", str(Path(native.__file__).parent)]
    done = subprocess.run([*command, "-fsyntax-only", str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
