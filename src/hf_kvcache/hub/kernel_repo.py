"""Ops as kernel repositories: loaded anywhere by the package `kernels`, without this library.

    README.md                              the card
    build/torch-universal/__init__.py      the op, what it is used with, `__all__`
    build/torch-universal/*.py             the modules of this library that it needs: checks, reference, Triton kernels
    build/torch-universal/metadata.json    name, identifier, digest of the files

The code needs torch; Triton where there is a GPU, else it runs in plain PyTorch. Native code stays in the library.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from importlib import import_module
from pathlib import Path

from hf_kvcache.hub.flatten import HEADER, OPS, files_of, flat
from hf_kvcache.hub.kernel_card import card_of

VERSION = 1  # of the signatures: a change that callers notice asks for the next one
VARIANT = Path("build", "torch-universal")

_PACKS = ("sparse_pack", "quant_pack")
# ops by name, and others that make their operands or go on with their results
WITH = {
    "dense_attention": ("merge_states",),
    "lowrank_attention": ("merge_states", "quant_pack"),
    "merge_states": (),
    "merge_step": (),
    "quant_attention": ("merge_states", "quant_pack"),
    "quant_pack": (),
    "ragged_attention": ("merge_states", *_PACKS),
    "row_weights": (),
    "slot_step": (),
    "sparse_attention": ("merge_states", *_PACKS),
    "sparse_pack": (),
}
# classes of operands that are defined elsewhere: names, and their modules
_OPERANDS = {
    "lowrank_attention": {"Rope": "hf_kvcache.rope", "RotaryTables": "hf_kvcache.rope"},
    "ragged_attention": {"SparseRows": f"{OPS}.sparse_attention"},
}


def build_kernel(op: str, directory: str | os.PathLike) -> Path:
    """Write the repository of an op, `directory/op`.

    Args:
        op: a key of `WITH`.
        directory: created if need be; files of an earlier build are replaced.

    Returns:
        The folder.

    Raises:
        ValueError: there is no such op.
    """
    from hf_kvcache import __version__

    files = sources(op, __version__)
    folder = Path(directory) / op
    variant = folder / VARIANT
    variant.mkdir(parents=True, exist_ok=True)
    for path in variant.glob("*.py"):
        path.unlink()
    for name, text in files.items():
        (variant / name).write_text(text, encoding="utf-8")
    metadata = metadata_of(op, files)
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").write_text(card_of(op, WITH[op], exports(op), VERSION, __version__), encoding="utf-8")
    return folder


def sources(op: str, version: str) -> dict[str, str]:
    """The Python files of an op's repository by name."""
    found = exports(op)
    roots = set(found.values())
    if f"{OPS}.sparse_attention" in roots:
        roots.add(f"{OPS}.sparse_attention.gluon_kernel")
    files = files_of(roots, version)
    files["__init__.py"] = HEADER.format(module=f"{OPS}.{op}", version=version) + _init(op, found)
    return dict(sorted(files.items()))


def exports(op: str) -> dict[str, str]:
    """What the repository of an op offers: names and the modules of this library that define them.

    Raises:
        ValueError: there is no such op.
    """
    if op not in WITH:
        raise ValueError(f"no op is called {op!r}; there are {', '.join(WITH)}")
    found = {name: f"{OPS}.{each}" for each in (op, *WITH[op]) for name in import_module(f"{OPS}.{each}").__all__}
    found |= _OPERANDS.get(op, {})
    return dict(sorted(found.items()))


def metadata_of(op: str, files: dict[str, str]) -> dict:
    """What `kernels` reads before it loads anything; the identifier becomes the name of the module."""
    digests = {name: _digest(text.encode()) for name, text in files.items()}
    content = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    has_kernels = any(name.endswith("_triton_kernel.py") for name in files)
    return {
        "name": op.replace("_", "-"),
        "id": f"_{op}_{content[:12]}",
        "version": VERSION,
        "license": "apache-2.0",
        "python-depends": [],
        # PTX: compiled where it runs, from 8.0 up
        "backend": {"type": "cuda", "archs": ["8.0+PTX"]} if has_kernels else {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": digests},
    }


def check_built(folder: Path) -> dict:
    """The metadata of a repository that `build_kernel` wrote.

    Raises:
        ValueError: it is not whole, or its files are not those that were built.
    """
    try:
        metadata = json.loads((folder / VARIANT / "metadata.json").read_text())
        built = metadata["digest"]["files"]
        found = {path.name: _digest(path.read_bytes()) for path in (folder / VARIANT).glob("*.py")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no kernel repository (metadata.json: {error!r})") from error
    changed = sorted(name for name in built | found if built.get(name) != found.get(name))
    if changed or not (folder / "README.md").exists():
        raise ValueError(f"{folder} is not what was built: see {', '.join(changed) or 'README.md'}")
    return metadata


def _digest(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def _init(op: str, found: dict[str, str]) -> str:
    """The rest of `__init__.py`."""
    of: dict[str, list[str]] = {}
    for name, module in found.items():
        of.setdefault(flat(module), []).append(name)
    imports = "\n".join(f"from .{module} import {', '.join(sorted(of[module]))}" for module in sorted(of))
    line = f"__all__ = [{', '.join(map(json.dumps, sorted(found)))}]"
    if len(line) > 120:
        line = "__all__ = [\n" + "".join(f"    {json.dumps(name)},\n" for name in sorted(found)) + "]"
    return f'"""{import_module(f"{OPS}.{op}").__doc__.strip()}"""\n\n{imports}\n\n{line}\n'
