"""The C++ backend reads and writes nothing outside its operands: AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import sys
from pathlib import Path

import pytest

import hf_kvcache.kernels.dense_attention  # noqa: F401
from hf_kvcache.kernels import compilers, native

LEVELS = [name for name in native.supported() if name in (native.supported()[0], "avx2", "scalar")]


def runtime():
    """The preloadable sanitizer of the compiler, or None."""
    try:
        found = compilers.run([*native.compiler(), "-print-file-name=libasan.so"])
    except native.BuildError:
        return None
    path = found.stdout.strip()
    return path if os.path.isabs(path) and Path(path).exists() else None


@pytest.mark.slow
@pytest.mark.skipif(native.why_no_compiler() is not None, reason="no C++ compiler")
@pytest.mark.skipif(runtime() is None, reason="the compiler has no AddressSanitizer")
@pytest.mark.parametrize("isa", LEVELS)
def test_sanitised(isa):
    environment = {
        **os.environ,
        "HF_KVCACHE_ISA": isa,
        "CXX": " ".join([*native.compiler(), "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1"]),
        "LD_PRELOAD": runtime(),
        # Python and torch leak by design; torch links its own copy of the C++ runtime
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
    }
    script = Path(__file__).with_name("run_sanitised.py")
    done = compilers.run([sys.executable, str(script)], env=environment)
    assert done.returncode == 0 and "clean" in done.stdout, (done.stdout + done.stderr)[-4000:]
