"""Modules of this library as files of one folder that import each other relatively: whole, but for their imports.

A repository's files are the import closure of what its cache needs. `hf_kvcache.stores.uniform` is `stores_uniform.py`
there; whoever wants to compare them takes the version in the file's first lines.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from pathlib import Path

PACKAGE = "hf_kvcache"
OPS = f"{PACKAGE}.kernels"
HEADER = "# SPDX-License-Identifier: Apache-2.0\n# {module}, as in hf_kvcache {version} but for its imports\n"
NOT_SHIPPED = f"{PACKAGE}.hub.not_shipped"

# what functions import for some caches only, or for what a repository is not there for: it comes along where it is
# asked for, else the function raises an ImportError that names the library (`not_shipped`)
OPTIONAL = {
    # which tokens stay, how rows are encoded, and attention to what that leaves; prompts are for C++
    f"{PACKAGE}.policies.base",
    f"{PACKAGE}.codecs.base",
    f"{PACKAGE}.codecs.chain",
    f"{PACKAGE}.codecs.fitting",
    f"{PACKAGE}.codecs.joint",
    f"{PACKAGE}.codecs.rotation",
    f"{PACKAGE}.attention.integers",
    f"{PACKAGE}.attention.kept_columns",
    f"{PACKAGE}.attention.latents",
    f"{PACKAGE}.attention.padding",
    f"{PACKAGE}.attention.pages",
    f"{PACKAGE}.attention.prompts",
    f"{PACKAGE}.attention.sparse_rows",
    f"{PACKAGE}.hf_layers",
    f"{PACKAGE}.per_layer",
    f"{PACKAGE}.rerotation",
    f"{PACKAGE}.stateful",
    f"{PACKAGE}.stores.shared",
    f"{PACKAGE}.text_positions",
    # how caches are described in files of their own
    f"{PACKAGE}.cache_config",
    # what a model carries for its cache, and what is found out about it
    f"{PACKAGE}.adapters.modules",
    f"{PACKAGE}.layer_context",
    f"{PACKAGE}.hub.basis_module",
    f"{PACKAGE}.hub.heads_module",
    f"{PACKAGE}.hub.retrofit_module",
    f"{PACKAGE}.rope_of_call",
    f"{PACKAGE}.rope_of_model",
    f"{PACKAGE}.rotary_embedding",
    # a second, faster kernel of the same rows, as long as the first; and the first, of rows in pages that need it
    f"{OPS}.sparse_attention.gluon_kernel",
    f"{OPS}.sparse_attention.triton_kernel",
    # how rows are written that are codes, or sparse
    f"{OPS}.quant_pack.reference",
    f"{OPS}.sparse_pack.reference",
    # files of caches, and methods by name: what the library is for
    f"{PACKAGE}.fingerprint",
    f"{PACKAGE}.persist",
    f"{PACKAGE}.pickling",
    f"{PACKAGE}.registry",
}
# of an op, found by their names; C++ stays in the library
_BACKENDS = ("reference", "triton_kernel")

# transformers refuses files that import what is not installed, unless they say that they can do without
_TRITON = re.compile(r"^(?:(?:import|from) triton\b.*\n)+", re.MULTILINE)
_GUARD = "except ImportError:  # PyTorch serves\n    raise\n"


def flat(module: str) -> str:
    """Name of a module of ours as a file beside others: "stores_uniform" for "hf_kvcache.stores.uniform"."""
    return module.removeprefix(f"{PACKAGE}.").replace(".", "_")


@cache
def where(module: str) -> Path | None:
    """The file of a module of ours, or None if there is no such module."""
    if module != PACKAGE and not module.startswith(f"{PACKAGE}."):
        return None
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)


def source_of(module: str) -> str:
    """The text of a module of ours."""
    return where(module).read_text(encoding="utf-8")


def files_of(roots: Iterable[str], version: str) -> dict[str, str]:
    """The files that some modules need, themselves among them, by name.

    Args:
        roots: names of modules.
        version: of this library, for the first lines.

    Raises:
        ValueError: two modules would be one file.
    """
    shipped = closure(roots)
    files = {}
    for module in sorted(shipped):
        name = f"{flat(module)}.py"
        if name in files:
            raise ValueError(f"{name} would be two modules, one of them {module}")
        files[name] = HEADER.format(module=module, version=version) + rewritten(source_of(module), shipped)
    if NOT_SHIPPED not in shipped and any(f"from .{flat(NOT_SHIPPED)} import" in text for text in files.values()):
        files |= files_of([NOT_SHIPPED], version)
    return files


def closure(roots: Iterable[str]) -> set[str]:
    """Modules that some modules import, themselves and backends of ops among them; of `OPTIONAL` the roots alone."""
    found, todo = set(), [*roots]
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += _asks_for(module)
    return found


@cache
def _asks_for(module: str) -> tuple[str, ...]:
    """The modules that a module cannot do without."""
    found = []
    for statement, when in _imports(_parsed(source_of(module))):
        targets = [] if when == "never" else [home for home, _ in _names(statement)]
        found += [target for target in targets if when == "loaded" or target not in OPTIONAL]
    if where(f"{module}.reference"):
        found += [f"{module}.{backend}" for backend in _BACKENDS if where(f"{module}.{backend}")]
    return tuple(found)


_parsed = cache(ast.parse)


def _imports(node: ast.AST, when: str = "loaded") -> Iterator[tuple[ast.ImportFrom, str]]:
    """Imports of modules of ours, and when they are done: "loaded", "called" in a function, or "never", for types."""
    for child in ast.iter_child_nodes(node):
        if _is_ours(child):
            yield child, when
        elif isinstance(child, ast.If) and getattr(child.test, "id", None) == "TYPE_CHECKING":
            yield from _imports(child, "never")
        elif isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            yield from _imports(child, "called" if isinstance(child, ast.FunctionDef) else when)


def _is_ours(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and where(node.module) is not None


def _names(statement: ast.ImportFrom) -> Iterator[tuple[str, str | None]]:
    """What an import takes: a module of ours and a name in it, or None for the module itself."""
    for alias in statement.names:
        inner = f"{statement.module}.{alias.name}"
        yield (inner, None) if where(inner) else (statement.module, alias.name)


def rewritten(source: str, shipped: Collection[str]) -> str:
    """A module's text with imports that are relative to one folder.

    Args:
        source: of a module of ours.
        shipped: the modules that are in the folder.
    """
    tree, lines = _parsed(source), source.splitlines(keepends=True)
    edits = [(s.lineno, s.end_lineno, _relative(s, lines, shipped)) for s, _ in _imports(tree)]
    for first, last, text in sorted(edits, reverse=True):
        lines[first - 1 : last] = [text]
    return _TRITON.sub(_guarded, "".join(lines))


def _relative(statement: ast.ImportFrom, lines: list[str], shipped: Collection[str]) -> str:
    """The lines of an import as they are in a repository."""
    text = "".join(lines[statement.lineno - 1 : statement.end_lineno])
    beside = flat(statement.module if statement.module in shipped else NOT_SHIPPED)
    names = [*_names(statement)]
    if all(name for _, name in names):
        return text.replace(statement.module, f".{beside}", 1)
    found: dict[str, list[str]] = {}
    for alias, (module, name) in zip(statement.names, names):
        is_file = name is None and module in shipped
        home = "." if is_file else f".{beside}" if name else f".{flat(NOT_SHIPPED)}"
        taken, bound = flat(module) if is_file else alias.name, alias.asname or alias.name
        found.setdefault(home, []).append(taken if taken == bound else f"{taken} as {bound}")
    indent, rest = " " * statement.col_offset, lines[statement.end_lineno - 1][statement.end_col_offset :]
    return "".join(f"{indent}from {home} import {', '.join(taken)}{rest}" for home, taken in found.items())


def _guarded(found: re.Match) -> str:
    """Imports that may fail, with a blank line above."""
    gap = "" if found.string[: found.start()].endswith("\n\n") else "\n"
    return f"{gap}try:\n{textwrap.indent(found[0], '    ')}{_GUARD}"
