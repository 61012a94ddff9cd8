"""The README of a kernel repository: how to load it, signatures, formats, limits."""

from __future__ import annotations

import ast
import re

from hf_kvcache.hub.flatten import OPS, source_of, where

# what the Triton kernels take; the rest goes to the reference, as their `obstacle` says
_16_BIT = "float16 and bfloat16 (float32 on a GPU goes to PyTorch)"
LIMITS = {
    "dense_attention": f"{_16_BIT}; head sizes up to 256.",
    "lowrank_attention": f"{_16_BIT}; head sizes and key ranks up to 256; ranks in whole multiples of 16.",
    "merge_step": "float16, bfloat16 and float32; contiguous `segment`, float32 `weights`; any head size.",
    "quant_attention": f"{_16_BIT}; head sizes in whole multiples of 16 up to 256; 8, 4 and 2 bits.",
    "quant_pack": "float16, bfloat16 and float32; 8, 4 and 2 bits; blocks of rows that are a power of two.",
    "ragged_attention": f"{_16_BIT}; head sizes up to 256; pages of 16, 32, 64, ... rows; 8, 4 and 2 bits.",
    "slot_step": "any sizes; rows of `place_rows` of any dtype.",
    "sparse_attention": f"{_16_BIT}; head sizes up to 256; 8, 4 and 2 bits. Channel numbers (`layout='index'`), unlike "
    "bitmaps, need Triton 3.7 and a head size that is a multiple of 16 from 64 up.",
    "sparse_pack": "float16, bfloat16 and float32; head sizes up to 256; groups whose size is a power of two.",
}

# parts of READMEs about what is not shipped, and counts that belong to the library's log
_NOT_SHIPPED = ("CPU", "Backends")
_COUNTS = re.compile(r"\n\*\*(Static|Measured)\b.*", re.DOTALL)

_TEXT = """---
library_name: kernels
license: apache-2.0
tags:
- kernels
- kv-cache
- kv-cache-compression
---

# {op}

{summary}

```python
from pathlib import Path

from kernels import get_kernel, get_local_kernel

kernel = get_kernel("this repository", version={version}, trust_remote_code=True)  # organisation/name
kernel = get_local_kernel(Path("{op}"))  # or a folder
kernel.{op}  # see below
```

{runs}

Offered: {names}.

## Signature

```python
{signature}
```

## Limits

{limits}

## Files

Built by `hf-kvcache kernel {op}` from hf_kvcache {made}: the library's modules, whole, unchanged but for imports.
`kernels_<op>_triton_kernel.py` is the library's `kernels/<op>/triton_kernel.py`, and so on. `metadata.json` holds a
SHA-256 digest of each. Licence: Apache 2.0.
{readmes}"""

_RUNS = """\
It needs torch. With Triton and a GPU (compute capability 8.0 or newer) Triton kernels run; everywhere else, and for
operands that need gradients, the same function runs in plain PyTorch, which a warning says once where there is a GPU.
The C++ kernels that hf_kvcache has for CPUs are not part of this repository."""
_RUNS_ANYWHERE = "It needs torch, and runs on any device."
_LIMITS = """\
Triton kernels: {limits} They have been run in Triton's interpreter, against the reference, and compiled for sm_80 and
sm_90; they have not been timed on a GPU."""
_NO_LIMITS = "There is no Triton kernel of this op: it is a few steps of PyTorch."


def card_of(op: str, others: tuple[str, ...], exports: dict[str, str], version: int, made: str) -> str:
    """The card of an op's repository.

    Args:
        op: its name.
        others: ops that come with it.
        exports: names that it offers -> modules of this library.
        version: of the repository.
        made: version of this library.
    """
    signature = signature_of(op)
    has_kernels = op in LIMITS
    return _TEXT.format(
        op=op,
        repository=op.replace("_", "-"),
        summary=_summary(signature),
        version=version,
        made=made,
        runs=_RUNS if has_kernels else _RUNS_ANYWHERE,
        names=", ".join(f"`{name}`" for name in exports),
        signature=signature,
        limits=_LIMITS.format(limits=LIMITS[op]) if has_kernels else _NO_LIMITS,
        readmes="".join(f"\n{text}\n" for each in (op, *others) if (text := _readme(each))),
    )


def signature_of(op: str) -> str:
    """The public function of an op as it is written, without its body."""
    source = source_of(f"{OPS}.{op}")
    function = next(statement for statement in ast.parse(source).body if getattr(statement, "name", None) == op)
    return "\n".join(source.splitlines()[function.lineno - 1 : function.body[0].end_lineno])


def _summary(signature: str) -> str:
    """The first paragraph of a function's docstring."""
    return ast.get_docstring(ast.parse(signature).body[0]).partition("\n\n")[0]


def _readme(op: str) -> str:
    """What an op's README says of formats and kernels, a level deeper; empty if nothing of that."""
    path = where(f"{OPS}.{op}").with_name("README.md")
    if not path.exists():
        return ""
    title, *sections = re.split(r"\n## ", path.read_text(encoding="utf-8").strip())
    heading, _, intro = title.partition("\n")
    kept = [intro.strip(), *(f"### {_kept(s)}" for s in sections if s.partition("\n")[0] not in _NOT_SHIPPED)]
    kept = [part for part in kept if part]
    return "\n\n".join([f"#{heading}", *kept]) if kept else ""


def _kept(section: str) -> str:
    return _COUNTS.sub("", section).strip()
