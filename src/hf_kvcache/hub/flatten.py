"""The part of the library that an exported repository needs, as flat files that import each other relatively."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_kvcache.hub.fold import Edit, Text, fold
from hf_kvcache.hub.library import PACKAGE, Module, imported, where
from hf_kvcache.hub.shake import Shaken

HEADER = "# SPDX-License-Identifier: Apache-2.0\n# From {module}, hf_kvcache {version}; made by `hf-kvcache export`.\n"

# where the library finds modules by their names
_BY_NAME = {
    'f"hf_kvcache.kernels.{op}.{\'triton_kernel\' if backend == \'triton\' else backend}"': (
        'f"{__name__}_{op}_{\'triton_kernel\' if backend == \'triton\' else backend}"'
    ),
}
WIDTH = 120  # of a line

_TRITON = "import triton\nimport triton.language as tl\n"
# transformers refuses files that import what is not installed, unless they say that they can do without
_GUARDED = """try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("these kernels need Triton; without it, PyTorch serves") from error
"""


@dataclass(frozen=True)
class Recipe:
    """What a repository needs of the library.

    Attributes:
        roots: "module:name" or "module:Class.member" that must be there.
        facts, absent: see `fold`; absent ones as "module:name".
        dropped: what is not to be followed, "module:Class.member".
    """

    roots: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def flat(module: str) -> str:
    """Name of a module of ours as a file beside others: "stores_uniform" for "hf_kvcache.stores.uniform"."""
    return module.removeprefix(f"{PACKAGE}.").replace(".", "_")


def flatten(recipe: Recipe, version: str) -> dict[str, str]:
    """The files of a repository by name, without the modeling file.

    Raises:
        ValueError: what is to be left out is needed.
    """
    absent = {path.partition(":")[2].rpartition(".")[2] for path in recipe.absent}

    def read(name: str) -> Module:
        return Module(name, fold(where(name).read_text(), recipe.facts, absent))

    shaken = Shaken(read, recipe.roots, {*recipe.dropped, *recipe.absent})
    files = {}
    for name, module in shaken.modules.items():
        body = _Flat(module, shaken, set(recipe.absent)).source()
        files[f"{flat(name)}.py"] = HEADER.format(module=name, version=version) + body
    return files


class _Flat:
    """One module on its way to a file."""

    def __init__(self, module: Module, shaken: Shaken, absent: set[str]):
        self.module, self.shaken, self.absent = module, shaken, absent

    def source(self) -> str:
        text = _apply(self.module.text, self._unneeded())
        text = _apply(text, self._untyped(text))
        source = _apply(text, self._imports(text)).text.decode()
        for old, new in _BY_NAME.items():
            source = source.replace(old, new)
        return _tidy(source.replace(_TRITON, _GUARDED))

    # -- what goes ---------------------------------------------------------------------------------------------------

    def _unneeded(self) -> list[Edit]:
        at, edits = self.module.text, []
        for statement in at.tree.body:
            bound = [name for name, unit in self.module.units.items() if unit is statement]
            augmented = getattr(statement, "target", None)
            if isinstance(statement, ast.AugAssign):
                bound = [augmented.id]
            if bound and not any((self.module.name, name) in self.shaken.defined for name in bound):
                edits.append(Edit(*at.lines_with_comments(statement), b""))
            elif isinstance(statement, ast.ClassDef):
                edits += self._members(statement)
        return edits

    def _members(self, cls: ast.ClassDef) -> list[Edit]:
        at, edits, left = self.module.text, [], len(cls.body)
        for statement in cls.body:
            name = getattr(statement, "name", None)
            if name is not None and (self.module.name, cls.name, name) not in self.shaken.members:
                edits.append(Edit(*at.lines_with_comments(statement), b""))
                left -= 1
        if not left:
            raise ValueError(f"nothing is left of {self.module.name}:{cls.name}")
        return edits

    def _origin(self, bound: str) -> tuple[str, str | None] | None:
        """Where an imported name is defined (module, name), past modules that only pass it on; None if it is gone."""
        source, name = self.module.imports[bound]
        while where(source) is not None:
            of = self.shaken.modules.get(source)
            if of is None or name is None or (source, name) in self.shaken.defined:
                return None if of is None else (source, name)
            if name not in of.imports:
                return None
            source, name = of.imports[name]
        return source, name

    def _untyped(self, text: Text) -> list[Edit]:
        """Types that have not come along, in annotations."""
        gone = {name for name in self.module.imports if self.module.is_ours(name) and self._origin(name) is None}
        gone |= {name for name in self.module.units if (self.module.name, name) not in self.shaken.defined}
        edits = []
        for node in ast.walk(text.tree):
            for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
                for name in ast.walk(part) if isinstance(part, ast.AST) else ():
                    if isinstance(name, ast.Name) and name.id in gone:
                        edits.append(Edit(text.start(name), text.stop(name), b"object"))
        return edits

    # -- imports -----------------------------------------------------------------------------------------------------

    def _imports(self, text: Text) -> list[Edit]:
        """Imports of what is left: of other libraries as they are, of ours relative and sorted behind them."""
        used = {node.id for node in ast.walk(text.tree) if isinstance(node, ast.Name)}
        edits, top = [], []
        for statement in ast.walk(text.tree):
            if not isinstance(statement, (ast.Import, ast.ImportFrom)):
                continue
            if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
                continue
            names = {
                bound: self._origin(bound)
                for bound in imported(statement)
                if bound in used and self._origin(bound) is not None
            }
            is_ours = isinstance(statement, ast.ImportFrom) and where(statement.module) is not None
            if not is_ours and len(names) == len(statement.names):
                continue
            lines = _import_lines(names) if is_ours else _without(statement, names)
            if statement.col_offset:
                lines = [" " * statement.col_offset + line for line in lines]
            elif is_ours:
                top, lines = [*top, *lines], []
            edits.append(Edit(*text.whole_lines(statement, statement), "".join(lines).encode()))
        return edits + self._block(text, top)

    def _block(self, text: Text, lines: list[str]) -> list[Edit]:
        """Imports of ours, behind the last of other libraries."""
        foreign = [line for line in lines if not line.split()[1].startswith(".")]
        ours = sorted(set(lines) - set(foreign), key=lambda line: (line.split()[1] != ".", line.lower()))
        if not lines:
            return []
        last = [s for s in text.tree.body if isinstance(s, (ast.Import, ast.ImportFrom)) and not _is_ours(s)][-1]
        at = text.lines[last.end_lineno]
        return [Edit(at, at, "".join([*foreign, "\n" * bool(ours), *ours]).encode())]


def _is_ours(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and where(statement.module) is not None


def _import_lines(names: dict[str, tuple[str, str | None]]) -> list[str]:
    """Statements that bind these names."""
    lines, of = [], {}
    for bound, (source, name) in names.items():
        if where(source) is not None and name is None:
            target = flat(source)
            lines.append(f"from . import {target}" + (f" as {bound}\n" if bound != target else "\n"))
        else:
            of.setdefault(source, []).append(name if name == bound else f"{name} as {bound}")
    for source, parts in of.items():
        module = f".{flat(source)}" if where(source) is not None else source
        parts = sorted(parts, key=lambda part: (not part.split()[0].isupper(), not part[0].isupper(), part))
        line = f"from {module} import {', '.join(parts)}\n"
        if len(line) > WIDTH + 1:
            line = f"from {module} import (\n" + "".join(f"    {part},\n" for part in parts) + ")\n"
        lines.append(line)
    return lines


def _without(statement: ast.stmt, names) -> list[str]:
    """An import of another library, of these names only."""
    kept = [a for a in statement.names if (a.asname or a.name.partition(".")[0]) in names]
    if not kept:
        return []
    left = ", ".join(f"{a.name} as {a.asname}" if a.asname else a.name for a in kept)
    return [(f"from {statement.module} import " if isinstance(statement, ast.ImportFrom) else "import ") + left + "\n"]


def _apply(text: Text, edits: list[Edit]) -> Text:
    source = text.text
    for edit in sorted(edits, reverse=True):
        source = source[: edit.start] + edit.text + source[edit.stop :]
    return Text(source)


def _tidy(source: str) -> str:
    """Blank lines as they should be where something has been taken out."""
    source = re.sub(r"\n{3,}(?=[ \t])", "\n\n", source)  # inside of what is indented: one
    source = re.sub(r"\n{4,}", "\n\n\n", source)
    return re.sub(r"\n+\Z", "\n", source)
