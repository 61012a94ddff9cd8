"""Builds the C++ source of an op on first use and loads it with ctypes.

A library is keyed by a hash of its source, the shared headers, the compiler and the flags, and lives in
`HF_KVCACHE_CACHE`, `$XDG_CACHE_HOME/hf_kvcache` or `~/.cache/hf_kvcache`. The instruction set is the best this CPU
has, `HF_KVCACHE_ISA` overrides it when an op is first used; `CXX` names the compiler. Without a compiler nothing
breaks: `unavailable` says why and the ops run on their PyTorch reference.

Of the arguments of ops it knows what those of attention share, `queries`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import lru_cache
from pathlib import Path

import torch

from hf_kvcache import kernels
from hf_kvcache.kernels import compilers

OPS = (
    "dense_attention",
    "lowrank_attention",
    "merge_step",
    "prompt_attention",
    "quant_attention",
    "quant_pack",
    "ragged_attention",
    "row_weights",
    "slot_step",
    "sparse_attention",
    "sparse_pack",
)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# struct Queries of attention.h: addresses, strides and sizes, then scaling and softcap
QUERIES = "18q2d"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
_HAS_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
# every CPU with the second byte instructions has the matrix ones
_VBMI2 = (*_AVX512, "-mavx512vnni", "-mavx512vbmi2", "-mgfni")
_HAS_VBMI2 = (*_HAS_AVX512, "avx512_vnni", "avx512_vbmi2", "gfni")
# best first: name, features the CPU must report, flags
LEVELS = {
    "avx512_bf16": ((*_HAS_VBMI2, "avx512_bf16"), (*_VBMI2, "-mavx512bf16")),
    "avx512_vbmi2": (_HAS_VBMI2, _VBMI2),
    "avx512_vnni": ((*_HAS_AVX512, "avx512_vnni"), (*_AVX512, "-mavx512vnni")),
    "avx512": (_HAS_AVX512, _AVX512),
    "avx2": (("avx2", "fma", "f16c"), ("-mavx2", "-mfma", "-mf16c")),
    "scalar": ((), ()),
}
COMPILE_SECONDS = 300
_INCLUDE = re.compile(r'^\s*#\s*include "(.+?)"', re.MULTILINE)

_lock = threading.Lock()
_reasons: dict[str, str] = {}


class BuildError(RuntimeError):
    """Raised when an op cannot be compiled or loaded; the message is the reason."""


def unavailable(op: str, device: torch.device) -> str | None:
    """Why the native `op` cannot run on `device`, or None; compiles it the first time it is asked."""
    if device.type != "cpu":
        return f"native code does not run on {device.type} tensors"
    try:
        functions[op]
    except BuildError as error:
        return str(error)
    return None


class _Functions(dict):
    def __missing__(self, op: str):
        with _lock:
            if op not in self and op not in _reasons:
                try:
                    self[op] = _load(op, build(op))
                except BuildError as error:
                    _reasons[op] = str(error)
            if op in _reasons:
                raise BuildError(_reasons[op])
            return self[op]


# The C functions by op, each built and loaded when it is first asked for; they take one bytes object, the packed
# arguments. Where there is no compiler, it fails or the library does not load, BuildError says so, again and again.
functions = _Functions()


def forget() -> None:
    """Forget loaded functions and remembered failures (tests)."""
    with _lock:
        functions.clear()
        _reasons.clear()
    kernels.forget()


def build(op: str, isa: str | None = None) -> Path:
    """Compile `op` unless its library is already cached; return the path of the library."""
    program = compiler()
    command = [*program, *FLAGS, *isa_flags(isa or instruction_set())]
    source = Path(sys.modules["hf_kvcache.kernels." + op].__file__).with_name("native.cpp")
    headers = Path(__file__).parent
    parts = _with_includes(source, headers)
    key = hashlib.sha256(b"\0".join([*parts, "\0".join(command).encode(), _version(program[0]).encode()])).hexdigest()
    folder = cache_folder()
    library = folder / f"{op}-{key[:20]}.so"
    if library.exists():
        return library
    # compiled under another name and renamed: a reader never sees half a file, two builders just waste one build
    with tempfile.TemporaryDirectory(prefix=f"{op}-", dir=folder) as scratch:
        compiled, linked = os.path.join(scratch, "op.o"), os.path.join(scratch, "op.so")
        _run([*command, "-I", str(headers), "-c", str(source), "-o", compiled])
        # linked without -fopenmp: the GOMP_* symbols then come from the OpenMP runtime torch has loaded, so that
        # there is one pool of threads, not two
        _run([*program, "-shared", compiled, "-o", linked])
        os.replace(linked, library)
    return library


def _with_includes(source: Path, headers: Path) -> list[bytes]:
    """The text of `source` and of all files it includes by a name in quotes, those of other ops among them."""
    texts, left = {}, [source]
    while left:
        path = left.pop()
        if path in texts:
            continue
        texts[path] = path.read_bytes()
        for name in _INCLUDE.findall(texts[path].decode()):
            beside = (path.parent / name).resolve()
            left.append(beside if beside.exists() else headers / name)
    return list(texts.values())


def instruction_set() -> str:
    """`HF_KVCACHE_ISA`, or the best level of this CPU."""
    wanted = os.environ.get("HF_KVCACHE_ISA")
    if wanted is None:
        return supported()[0]
    if wanted not in supported():
        raise BuildError(f"HF_KVCACHE_ISA={wanted!r} is not one of {', '.join(supported())}")
    return wanted


@lru_cache(None)
def supported() -> tuple[str, ...]:
    """Names of the levels this CPU can run, best first."""
    features = set()
    if platform.machine() in ("x86_64", "AMD64"):
        try:
            found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
            features = set(found.group(1).split()) if found else set()
        except OSError:
            pass
    return tuple(name for name, (needed, _) in LEVELS.items() if features.issuperset(needed))


def isa_flags(isa: str) -> tuple[str, ...]:
    """Compiler flags of a level."""
    # off x86 the one portable level may use whatever this machine has; its cache is not shared with another one
    return LEVELS[isa][1] if platform.machine() in ("x86_64", "AMD64") else ("-mcpu=native",)


def compiler() -> list[str]:
    """The C++ compiler as a command: `CXX`, else g++ or clang++ on PATH."""
    if sys.platform == "win32":
        raise BuildError("native code is not built on Windows")
    named = os.environ.get("CXX")
    if named:
        words = named.split()
        if words and shutil.which(words[0]):
            return words
        raise BuildError(f"the compiler CXX={named!r} is not found")
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler is found (install g++ or set CXX)")


def why_no_compiler() -> str | None:
    """Why nothing can be compiled here, or None. A source that fails to compile is no reason."""
    try:
        compiler()
    except BuildError as error:
        return str(error)
    return None


def usual_folder() -> Path:
    """Where libraries are kept, unless that cannot be written; it need not exist."""
    named = os.environ.get("HF_KVCACHE_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_kvcache"


def cache_folder() -> Path:
    """Where libraries are kept; a private temporary folder when the usual one cannot be written."""
    base = usual_folder()
    try:
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=base):
            return base
    except OSError:
        return _temporary_folder()


@lru_cache(None)
def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="hf_kvcache-"))


@lru_cache(None)
def _version(name: str) -> str:
    return _run([name, "--version"])


def _run(command: list[str]) -> str:
    try:
        done = compilers.run(command, COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
        raise BuildError(f"{command[0]} failed: {first}")
    return done.stdout


def _load(op: str, library: Path):
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError:
        try:
            # torch links another OpenMP runtime here: bring the one of the compiler
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
            loaded = ctypes.CDLL(str(library))
        except OSError as error:
            raise BuildError(f"the library of {op} does not load: {error}") from None
    found = loaded[op]
    found.argtypes, found.restype = [ctypes.c_char_p], None
    return found


def queries(q, n_kv_heads, width, mask, scaling, softcap):
    """Outputs of a call and the fields of `struct Queries`; q and mask come back because they must stay alive."""
    B, Hq, S, D = q.shape
    if q.stride(3) != 1:
        q = rows_contiguous(q)
    out = torch.empty(B, Hq, S, width, dtype=q.dtype)
    lse = torch.empty(B, Hq, S, dtype=torch.float32)
    mask_fields = 0, 0, 0, 0
    if mask is not None:
        mask = rows_contiguous(mask)
        batch, head, query, _ = mask.stride()
        # a size of 1 is shared by every batch row or head
        mask_fields = mask.data_ptr(), batch * (mask.shape[0] > 1), head * (mask.shape[1] > 1), query
    fields = (
        q.data_ptr(), *q.stride()[:3], out.data_ptr(), lse.data_ptr(), *mask_fields,
        DTYPES[q.dtype], B, n_kv_heads, Hq // n_kv_heads, S, D, width, torch.get_num_threads(),
        scaling, softcap or 0.0,
    )  # fmt: skip
    return q, mask, out, lse, fields


def rows(x):
    """Address of `[B, H, n, D]` and its strides over batch, head and row."""
    batch, head, row, _ = x.stride()
    return x.data_ptr(), batch, head, row


def rows_contiguous(x):
    """`x`, copied only where the elements of a row are not adjacent."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
