"""The part of the library that an exported repository needs, as flat files that import each other relatively."""

from __future__ import annotations

import ast
import functools
import re
import sys
from dataclasses import dataclass

from hf_kvcache.hub.fold import fold
from hf_kvcache.hub.library import PACKAGE, Module, imported, where
from hf_kvcache.hub.shake import Shaken, member_key, member_names
from hf_kvcache.hub.text import WIDTH, Edit, Text, until_done
from hf_kvcache.hub.untyped import untyped

HEADER = "# SPDX-License-Identifier: Apache-2.0\n# {module} {version}\n"

# where the library finds modules by their names
_BY_NAME = {
    # without a compiler
    'if device.type == "cuda" else "native"': 'if device.type == "cuda" else "reference"',
    "f\"hf_kvcache.kernels.{op}.{'triton_kernel' if backend == 'triton' else backend}\"": (
        "f\"{__name__}_{op}_{'triton_kernel' if backend == 'triton' else backend}\""
    ),
}
_BANNER = re.compile(r"^ *# -- .*-{8,}\n\n?", re.MULTILINE)
FUTURE = "from __future__ import annotations\n\n"

# transformers refuses files that import what is not installed, unless they say that they can do without
_GUARD = ("except ImportError:  # PyTorch serves\n", "    raise\n")


@dataclass(frozen=True)
class Recipe:
    """What a repository needs of the library.

    Attributes:
        roots: "module:name" or "module:Class.member" that must be there.
        absent: see `fold`, as "module:name".
        dropped: what is not to be followed, "module:Class.member".
        is_documented: whether docstrings keep their sections.
    """

    roots: tuple[str, ...]
    absent: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    is_documented: bool = False


def flat(module: str) -> str:
    """Name of a module of ours as a file beside others: "stores_uniform" for "hf_kvcache.stores.uniform"."""
    return module.removeprefix(f"{PACKAGE}.").replace(".", "_")


def flatten(recipe: Recipe, version: str) -> dict[str, str]:
    """The files of a repository by name, without the modeling file.

    Raises:
        ValueError: nothing is left of a class that is needed.
    """
    absent = frozenset(path.rpartition(":")[2].rpartition(".")[2] for path in recipe.absent)
    shaken = Shaken(functools.partial(_read, absent), recipe.roots, {*recipe.dropped, *recipe.absent})
    _refuse_ambiguous(recipe, shaken)
    files = {}
    for name, module in shaken.modules.items():
        body = _Flat(module, shaken).source(recipe.is_documented)
        files[f"{flat(name)}.py"] = HEADER.format(module=name, version=version) + body
    return files


def _refuse_ambiguous(recipe: Recipe, shaken: Shaken) -> None:
    """Calls are left out by name, so nothing else that there is may have it."""
    meant = {path.rpartition(":")[2].rpartition(".")[2]: path for path in recipe.absent}
    for path in shaken.functions():
        name = path.rpartition(":")[2].rpartition(".")[2]
        if path not in recipe.absent and name in meant:
            raise ValueError(f"{meant[name]} is to be absent, and {path} would be, too")


def _read(absent: frozenset[str], name: str) -> Module:
    return Module(name, fold(where(name).read_text(), absent))


class _Flat:
    """One module on its way to a file."""

    def __init__(self, module: Module, shaken: Shaken):
        self.module, self.shaken = module, shaken

    def source(self, is_documented: bool = False) -> str:
        text = self.module.text.edited(self._unneeded())
        if not is_documented:
            text = until_done(text.edited(brief(text)), untyped)
        text = text.edited(self._untyped(text))
        source = text.edited(self._imports(text)).text.decode()
        source = _BANNER.sub("", source)
        for old, new in _BY_NAME.items():
            source = source.replace(old, new)
        return _tidy(source)

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
            key = self.module.name, cls.name, member_key(statement)
            if member_names(statement) and key not in self.shaken.members:
                edits.append(Edit(*at.lines_with_comments(statement), b""))
                left -= 1
        for base in cls.bases:
            # what is abstract of it has been left behind
            if at.text[at.start(base) - 1 : at.stop(base) + 1] == b"(ABC)":
                edits.append(Edit(at.start(base) - 1, at.stop(base) + 1, b""))
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
                        edits.append(Edit(text.start(name), text.stop(name), b"Any"))
        return edits

    # -- imports -----------------------------------------------------------------------------------------------------

    def _imports(self, text: Text) -> list[Edit]:
        """The imports that are left, in the order that linters ask for; ours are relative."""
        names = [node for node in ast.walk(text.tree) if isinstance(node, ast.Name)]
        used = {name.id for name in names if isinstance(name.ctx, ast.Load)}
        passed_on = {name for module, name in self.shaken.asked if module == self.module.name} - used
        edits, lines, first = [], [], None
        for statement in ast.walk(text.tree):
            if not isinstance(statement, (ast.Import, ast.ImportFrom)):
                continue
            if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
                first = statement
                continue
            names = {
                bound: self._origin(bound)
                for bound in imported(statement)
                if bound in used | passed_on and self._origin(bound) is not None
            }
            found = _import_lines(names, passed_on) if _is_ours(statement) else _without(statement, names)
            if statement.col_offset:
                inner = "".join(" " * statement.col_offset + line for line in found)
                edits.append(Edit(*text.whole_lines(statement, statement), inner.encode()))
            else:
                lines += found
                edits.append(Edit(*text.whole_lines(statement, statement), b""))
        if "Any" in used and "Any" not in self.module.imports:
            lines.append("from typing import Any\n")
        at = text.lines[first.end_lineno]
        return [*edits, Edit(at, at, block(lines).encode())]


def block(lines: list[str]) -> str:
    """Imports in sections: the standard library, others, Triton if it is there, ours."""
    sections: dict[int, set[str]] = {}
    for line in _joined(lines):
        module = line.split()[1]
        top = module.partition(".")[0]
        section = 3 if module.startswith(".") else 0 if top in sys.stdlib_module_names else 2 if top == "triton" else 1
        sections.setdefault(section, set()).add(line)
    ordered = {k: sorted(v, key=lambda line: (line.split()[0] == "from", line.lower())) for k, v in sections.items()}
    if 3 in ordered:
        ordered[3].sort(key=lambda line: (line.split()[1] != ".", line.lower()))
    if 2 in ordered:
        ordered[2] = ["try:\n", *(f"    {line}" for line in ordered[2]), *_GUARD]
    return "".join("\n" + "".join(ordered[k]) for k in sorted(ordered))


def _joined(lines: list[str]) -> list[str]:
    """One statement for all names of a module, but for those that are renamed."""
    names, others = {}, []
    for line in lines:
        word, module, *rest = line.split(maxsplit=3)
        if word == "from" and " as " not in line:
            names.setdefault(module, set()).update(
                part.strip() for part in rest[1].strip("()\n ").split(",") if part.strip()
            )
        else:
            others.append(line)
    return others + [_from(module, parts) for module, parts in names.items()]


def _from(module: str, parts) -> str:
    parts = sorted(parts, key=lambda part: (not part.split()[0].isupper(), not part[0].isupper(), part))
    line = f"from {module} import {', '.join(parts)}\n"
    return (
        line if len(line) <= WIDTH + 1 else f"from {module} import (\n" + "".join(f"    {p},\n" for p in parts) + ")\n"
    )


def _is_ours(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and where(statement.module) is not None


def _import_lines(names: dict[str, tuple[str, str | None]], passed_on: set[str]) -> list[str]:
    """Statements that bind these names; those that are only passed on say so to linters."""
    lines, of = [], {}
    for bound, (source, name) in names.items():
        if where(source) is not None and name is None:
            target = flat(source)
            lines.append(f"from . import {target}" + (f" as {bound}\n" if bound != target else "\n"))
        else:
            of.setdefault(source, []).append(name if name == bound and name not in passed_on else f"{name} as {bound}")
    for source, parts in of.items():
        module = f".{flat(source)}" if where(source) is not None else source
        lines += [_from(module, [part]) for part in parts if " as " in part]
        plain = [part for part in parts if " as " not in part]
        lines += [_from(module, plain)] if plain else []
    return lines


def _without(statement: ast.stmt, names) -> list[str]:
    """An import of another library, of these names only."""
    kept = [a for a in statement.names if (a.asname or a.name.partition(".")[0]) in names]
    if not kept:
        return []
    left = ", ".join(f"{a.name} as {a.asname}" if a.asname else a.name for a in kept)
    return [(f"from {statement.module} import " if isinstance(statement, ast.ImportFrom) else "import ") + left + "\n"]


def _tidy(source: str) -> str:
    """Blank lines as they should be where something has been taken out."""
    source = re.sub(r"\n{3,}(?=[ \t])", "\n\n", source)  # one within a definition
    source = re.sub(r"\n{4,}", "\n\n\n", source)
    lines, body = source.splitlines(keepends=True), ast.parse(source).body
    ends = [s.end_lineno for s in body if isinstance(s, (ast.Import, ast.ImportFrom, ast.Try))]
    after = next((s for s in body if s.lineno > ends[-1]), None)
    n_blank = 2 if isinstance(after, (ast.FunctionDef, ast.ClassDef)) else 1
    rest = "".join(lines[ends[-1] :]).strip("\n")
    source = "".join(lines[: ends[-1]]) + ("\n" * n_blank + rest + "\n" if rest else "")
    return source if _has_annotations(ast.parse(source)) else source.replace(FUTURE, "", 1)


def _has_annotations(tree: ast.AST) -> bool:
    nodes = list(ast.walk(tree))
    return any(getattr(node, "annotation", None) or getattr(node, "returns", None) for node in nodes)


def brief(text: Text) -> list[Edit]:
    """First paragraphs of docstrings: what arguments are is told where the library is documented."""
    edits = []
    for node in ast.walk(text.tree):
        if not isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) or ast.get_docstring(node) is None:
            continue
        doc = node.body[0]
        whole = text.of(doc)
        if (end := whole.find(b"\n\n")) >= 0:
            kept = whole[:end].rstrip()
            width = len(kept.rpartition(b"\n")[2]) + (0 if b"\n" in kept else doc.col_offset)
            quotes = b'"""' if width + 3 <= WIDTH else b"\n" + b" " * doc.col_offset + b'"""'
            edits.append(Edit(text.start(doc), text.stop(doc), kept + quotes))
    return edits
