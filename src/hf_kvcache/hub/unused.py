"""Local names that nothing reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from hf_kvcache.hub.fold import Edit, Text

_FRESH = ("arange", "full", "zeros")  # functions that make a tensor, and do nothing else


def unused(text: Text) -> list[Edit]:
    """Take out assignments to local names that nothing reads, where finding the value does nothing else."""
    edits: dict[int, Edit] = {}
    for function in ast.walk(text.tree):
        if isinstance(function, ast.FunctionDef):
            read = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            for suite in _suites(function):
                for statement in suite if len(suite) > 1 else ():
                    if (edit := _edit(text, statement, read)) is not None:
                        edits.setdefault(edit.start, edit)
    return list(edits.values())


def _edit(text: Text, statement: ast.stmt, read: set[str]) -> Edit | None:
    if not isinstance(statement, (ast.Assign, ast.AnnAssign)) or statement.value is None:
        return None
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    if all(_is_idle(target, statement.value, read) for target in targets):
        return Edit(*text.lines_with_comments(statement), b"")
    target, value = targets[0], statement.value
    if len(targets) > 1 or not (isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)):
        return None
    pairs = list(zip(target.elts, value.elts))
    left = [pair for pair in pairs if not _is_idle(*pair, read)]
    if len(left) == len(pairs) or len(target.elts) != len(value.elts):
        return None
    sides = (b", ".join(text.of(part) for part in side) for side in zip(*left))
    return Edit(text.start(statement), text.stop(statement), b" = ".join(sides))


def _is_idle(target: ast.expr, value: ast.expr, read: set[str]) -> bool:
    return isinstance(target, ast.Name) and target.id not in read and not any(map(_does, ast.walk(value)))


def _does(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return getattr(node.func, "attr", None) not in _FRESH
    return isinstance(node, (ast.Await, ast.Yield, ast.NamedExpr, ast.Starred))


def _suites(function: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(function):
        for field in ("body", "orelse", "finalbody"):
            if isinstance(suite := getattr(node, field, None), list):
                yield suite
