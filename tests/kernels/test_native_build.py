"""Building and caching of the C++ backend, and what happens without a compiler."""

import os
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import hf_kvcache.kernels.dense_attention  # noqa: F401
import hf_kvcache.kernels.quant_attention  # noqa: F401
import hf_kvcache.kernels.quant_pack  # noqa: F401
import hf_kvcache.kernels.slot_step  # noqa: F401
from hf_kvcache.kernels import BackendUnavailable, choose, compilers, native, use_backend
from hf_kvcache.kernels.dense_attention import dense_attention

CPU = torch.device("cpu")
OP = "slot_step"  # the quickest to compile
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


@pytest.mark.slow
@needs_compiler
def test_two_processes_at_once(fresh):
    code = f"import hf_kvcache.kernels.{OP}; from hf_kvcache.kernels import native; print(native.build({OP!r}))"
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: compilers.run([sys.executable, "-c", code], 300), range(2)))
    paths = {process.stdout.strip() for process in done}
    assert all(process.returncode == 0 for process in done)
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


@pytest.fixture
def stuck(tmp_path, monkeypatch):
    """A compiler that waits for a child of its own; the reading end of a pipe that the child holds open."""
    pipe, script = tmp_path / "pipe", tmp_path / "cxx"
    os.mkfifo(pipe)
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n(echo $$; exec sleep 1000) > {pipe} &\nwait\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reading, True)
    yield reading
    os.close(reading)


def until_closed(pipe) -> bytes:
    """What is written until all processes that hold the other end are gone."""
    found = b""
    while select.select([pipe], [], [], 30)[0]:
        part = os.read(pipe, 100)
        if not part:
            return found
        found += part
    raise AssertionError("the child of the compiler goes on")


def test_a_compiler_that_takes_too_long_ends_with_its_children(fresh, stuck, monkeypatch):
    monkeypatch.setattr(native, "COMPILE_SECONDS", 3)
    with pytest.raises(native.BuildError, match="timed out after 3 seconds"):
        native.build(OP)
    assert until_closed(stuck).strip().isdigit()
    # nothing half compiled stays
    assert not list(fresh.glob(f"{OP}*"))


def test_an_interrupt_ends_the_compiler_with_its_children(fresh, stuck):
    code = f"import hf_kvcache.kernels.{OP}; from hf_kvcache.kernels import native; native.build({OP!r})"
    builder = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        assert select.select([stuck], [], [], 120)[0] and os.read(stuck, 100).strip().isdigit()
        builder.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in builder.communicate(timeout=60)[1]
        assert until_closed(stuck) == b""
    finally:
        builder.kill()
    assert not list(fresh.glob(f"{OP}*"))


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


@pytest.mark.slow
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
    done = compilers.run([*command, "-fsyntax-only", str(source)])
    assert done.returncode == 0, done.stderr[:2000]
