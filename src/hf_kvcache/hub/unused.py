"""Local names and attributes that nothing reads."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator, Set

from hf_kvcache.hub.text import Edit, Text

_FRESH = ("arange", "full", "zeros")  # functions that make a tensor, and do nothing else


def unused(text: Text) -> list[Edit]:
    """Take out assignments to local names that nothing reads, where finding the value does nothing else."""
    edits: dict[int, Edit] = {}
    for function in ast.walk(text.tree):
        if isinstance(function, ast.FunctionDef):
            read = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            is_idle = functools.partial(_is_idle, read)
            for suite in _suites(function):
                for statement in suite if len(suite) > 1 else ():
                    if (edit := _without(text, statement, is_idle)) is not None:
                        edits.setdefault(edit.start, edit)
    return list(edits.values())


def unread(text: Text, names: Set[str]) -> list[Edit]:
    """Take out what is put into attributes of these names, which nothing reads."""
    edits, is_idle = [], functools.partial(_is_unread, names)
    for function in ast.walk(text.tree):
        for suite in _suites(function) if isinstance(function, ast.FunctionDef) else ():
            for statement in suite if len(suite) > 1 else ():
                if isinstance(statement, ast.Assign) and len(statement.targets) > 1:
                    edits += _links(text, statement, names)
                elif (edit := _without(text, statement, is_idle)) is not None:
                    edits.append(edit)
    return edits


def _is_unread(names: Set[str], target: ast.expr, value: ast.expr) -> bool:
    return isinstance(target, ast.Attribute) and target.attr in names and not any(map(_does, ast.walk(value)))


def _links(text: Text, statement: ast.Assign, names: Set[str]) -> list[Edit]:
    """Links of a chain of targets, such as `a = b = 0`, but for the last."""
    for target, after in zip(statement.targets, [*statement.targets[1:], statement.value]):
        if _is_unread(names, target, statement.value):
            return [Edit(text.start(target), text.start(after), b"")]
    return []


def _without(text: Text, statement: ast.stmt, is_idle: Callable[[ast.expr, ast.expr], bool]) -> Edit | None:
    """A statement without those of its targets that do nothing, one after another or side by side."""
    if not isinstance(statement, (ast.Assign, ast.AnnAssign)) or statement.value is None:
        return None
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    if all(is_idle(target, statement.value) for target in targets):
        return Edit(*text.lines_with_comments(statement), b"")
    target, value = targets[0], statement.value
    if len(targets) > 1 or not (isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)):
        return None
    pairs = list(zip(target.elts, value.elts))
    left = [pair for pair in pairs if not is_idle(*pair)]
    if len(left) == len(pairs) or len(target.elts) != len(value.elts):
        return None
    if not left:
        return Edit(*text.lines_with_comments(statement), b"")
    sides = (b", ".join(text.of(part) for part in side) for side in zip(*left))
    return Edit(text.start(statement), text.stop(statement), b" = ".join(sides))


def _is_idle(read: set[str], target: ast.expr, value: ast.expr) -> bool:
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
