"""The library's own modules as text: what they define, and what they take from each other."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

from hf_kvcache.hub.text import Text

PACKAGE = "hf_kvcache"


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


class Module:
    """A module of ours, in the text that it has come to.

    Attributes:
        name: dotted, as in the library.
        text: see `Text`.
        units: top-level definitions by name: functions, classes, and what is assigned.
        imports: names that top-level imports bind -> (module, name in it), or (module, None) for a module itself.
    """

    def __init__(self, name: str, source: str):
        self.name, self.text = name, Text(source.encode())
        self.units: dict[str, ast.stmt] = {}
        self.imports: dict[str, tuple[str, str | None]] = {}
        for statement in self.text.tree.body:
            for bound in defined(statement):
                self.units[bound] = statement
        for statement in ast.walk(self.text.tree):
            for bound, of in imported(statement).items():
                if self.imports.setdefault(bound, of) != of:
                    raise ValueError(f"{name} binds {bound} to {self.imports[bound]} and to {of}")

    def is_ours(self, bound: str) -> bool:
        """Whether a name was imported from a module of ours."""
        return bound in self.imports and where(self.imports[bound][0]) is not None


def imported(statement: ast.AST) -> dict[str, tuple[str, str | None]]:
    """What an import binds, see `Module`; empty for other nodes."""
    found = {}
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            found[alias.asname or alias.name.partition(".")[0]] = alias.name, None
    elif isinstance(statement, ast.ImportFrom):
        for alias in statement.names:
            inner = f"{statement.module}.{alias.name}"
            of = (inner, None) if where(inner) else (statement.module, alias.name)
            found[alias.asname or alias.name] = of
    return found


def defined(statement: ast.stmt) -> list[str]:
    """Names that a top-level statement binds, imports aside."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    targets = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)):
        targets = [statement.target]
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
