"""The two rooms of tests: `make test` leaves out what is marked slow, `make test-all` runs everything."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath

import pytest

from hf_kvcache.kernels import native

# files and folders whose tests take longest, longest first: what is left for the end is short, so that both workers end
# together
HEAVY = (
    "kernels/test_native_asan.py",
    "kernels/test_triton_compile.py",
    "dmc/test_recall.py",
    "test_generate.py",
    "test_imports.py",
    "hub/test_export.py",
    "trainers/test_launch.py",
    "architectures/",
    "kernels/test_interpreter.py",
    "kernels/test_log_sum_exp.py",
    "hub/",
    "test_bytes.py",
    "test_embedded.py",
    "test_float64.py",
    "distributed/",
    "dmc/",
    "kernels/",
)


def telling(cases: Iterable, *short) -> list:
    """Parameters of which only those in `short` are asked in the short room."""
    cases = list(cases)
    assert all(case in cases for case in short), f"{short} are not all among {cases}"
    return [case if case in short else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def levels(*same: str) -> list:
    """Instruction sets of this CPU: the best one, and as slow tests all others; `same` equal a better one."""
    best, *others = native.supported()
    return [best, *(pytest.param(name, marks=pytest.mark.slow) for name in others if name not in same)]


def on_levels(*same: str):
    """A fixture, the instruction set that native code is built for: those of `levels`."""

    @pytest.fixture(params=levels(*same))
    def isa(request, monkeypatch):
        monkeypatch.setenv("HF_KVCACHE_ISA", request.param)
        native.forget()
        yield request.param
        native.forget()

    return isa


def is_whole(config: pytest.Config) -> bool:
    """Whether the tests of a run include the slow ones."""
    return "not slow" not in config.option.markexpr


def by_weight(path: PurePath) -> int:
    """Place of a file in the order of tests: heavy ones first, all others in the order in which they are found."""
    name = path.as_posix()
    return next((i for i, heavy in enumerate(HEAVY) if f"/tests/{heavy}" in name), len(HEAVY))
