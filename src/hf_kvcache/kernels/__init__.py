"""One op per storage format; this module says which backend runs it.

An op lives in `kernels/<op>/` and is installed as `hf_kvcache.kernels.<op>`. Its `__init__` checks
the arguments and calls `select`, which returns the function of the best backend that can do the job:

    reference   plain PyTorch, any device: the definition of the op
    native      C++ for CPU tensors, compiled on first use (`hf_kvcache.kernels.native`)
    triton      fused kernels for CUDA tensors

`use_backend` overrides the choice (tests, benchmarks); `HF_KVCACHE_BACKEND` does it for a process. What ops of
attention have in common is in this folder: `check_operands`, `online_softmax` for references, `split_kv` for Triton,
`native.queries` and headers for C++.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from hf_kvcache.warn import warn_once

BACKENDS = ("native", "triton", "reference")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)

# what stands between the parts of a module's name; in a repository that brings its code this is a file beside others,
# `kernels_quant_pack_reference.py` one of them, and there is no C++
_IS_PACKAGE = "__path__" in globals()
_DOT = "." if _IS_PACKAGE else "_"

_forced: list[str] = []
# modules of the fast backend that can run an op on a device
_able: dict[tuple[str, torch.device], ModuleType] = {}


@dataclass(frozen=True)
class Choice:
    """The backend chosen for a call and the reason, for `hf-kvcache doctor`."""

    backend: str
    reason: str


class BackendUnavailable(RuntimeError):
    """Raised when a backend that was asked for by name cannot run the op."""


def forced_backend() -> str | None:
    """Name of the backend asked for by `use_backend` or `HF_KVCACHE_BACKEND`, or None."""
    name = _forced[-1] if _forced else os.environ.get("HF_KVCACHE_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"HF_KVCACHE_BACKEND={name!r} is not one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str):
    """Run every op inside the block with one backend; raises `BackendUnavailable` where it cannot."""
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def forget() -> None:
    """Ask again which backends can run an op (tests)."""
    _able.clear()


def choose(op: str, device: torch.device, operands: tuple = ()) -> Choice:
    """Pick the backend of `op` on `device`.

    Args:
        op: folder name of the op.
        device: device of the operands.
        operands: what the `obstacle` function of the op's backend wants to see of a call, the tensor that decides
            dtype and gradients first; empty asks about the backend as such.
    """
    wanted = forced_backend()
    if wanted is not None:
        why_not = _obstacle(op, wanted, device, operands)
        if why_not:
            raise BackendUnavailable(f"{op}: backend {wanted!r} was asked for but {why_not}")
        return Choice(wanted, "asked for")
    fast = fast_backend(device)
    why_not = _obstacle(op, fast, device, operands)
    return Choice("reference", why_not) if why_not else Choice(fast, f"{device.type} tensors")


def select(op: str, device: torch.device, operands: tuple = (), name: str | None = None):
    """The function that runs `op` on `device`; says once, with the reason, when that is the reference.

    Args:
        op, device, operands: see `choose`.
        name: of the function, where an op has several.
    """
    if _forced or os.environ.get("HF_KVCACHE_BACKEND"):
        return getattr(_module(op, choose(op, device, operands).backend), name or op)
    module = _able.get((op, device))
    if module is None:
        why_not = _obstacle(op, fast_backend(device), device, operands)
    else:
        why_not = _of_operands(module, operands)
    if why_not is None:
        return getattr(module or _note_able(op, device), name or op)
    warn_once(f"{op} runs on the PyTorch reference: {why_not}")
    return getattr(_module(op, "reference"), name or op)


def fast_backend(device: torch.device) -> str:
    """The backend that is tried first on a device."""
    return "triton" if device.type == "cuda" else "native" if _IS_PACKAGE else "reference"


def _note_able(op: str, device: torch.device) -> ModuleType:
    """The module of the fast backend, which can run `op` on `device`: from now on only operands are looked at."""
    backend = fast_backend(device)
    module = _module(op, backend)
    # the reference takes whatever comes
    return module if backend == "reference" else _able.setdefault((op, device), module)


@cache
def _module(op: str, backend: str):
    return import_module(_name(op, backend))


def _name(op: str, backend: str) -> str:
    return _DOT.join([__name__, op, "triton_kernel" if backend == "triton" else backend])


def _obstacle(op: str, backend: str, device: torch.device, operands: tuple) -> str | None:
    """Why a backend cannot take a call, or None."""
    if backend == "reference":
        return None
    try:
        module = _module(op, backend)
    except ImportError as error:
        if error.name == _name(op, backend):
            return f"there is no {backend} kernel of this op"
        return f"{backend} is not installed ({error})"
    return module.unavailable(device) or _of_operands(module, operands)


def _of_operands(module, operands: tuple) -> str | None:
    """Why a backend that runs on this device cannot take a call, or None."""
    if not operands:
        return None
    x = operands[0]
    if x.requires_grad and torch.is_grad_enabled():
        return "gradients are needed"
    if x.dtype not in FLOATS:
        return f"{x.dtype} is not supported"
    own = getattr(module, "obstacle", None)
    return None if own is None else own(*operands)


def check_operands(q, k, v, mask, n_rows=None):
    """Raise ValueError unless q, k, v and mask describe one attention call over `n_rows` rows (default: those of k)."""
    n_rows = k.shape[2] if n_rows is None else n_rows
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError("q, k and v must be [B, H, rows, D]")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit together")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"head size of q is {q.shape[-1]}, of k {k.shape[-1]}")
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}")
    if mask is not None:
        B, S = q.shape[0], q.shape[2]
        sizes_fit = mask.dim() == 4 and mask.shape[0] in (1, B) and mask.shape[1] in (1, k.shape[1])
        if mask.dtype != torch.bool or not sizes_fit or mask.shape[2:] != (S, n_rows):
            wanted = f"[{B}|1, {k.shape[1]}|1, {S}, {n_rows}]"
            raise ValueError(f"mask must be bool {wanted}, got {mask.dtype} {list(mask.shape)}")
