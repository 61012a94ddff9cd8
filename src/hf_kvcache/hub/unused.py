"""Local names and attributes that nothing reads."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Set

from hf_kvcache.hub.text import Edit, Text
from hf_kvcache.hub.values import name_of

_IDLE = ("arange", "full", "zeros", "numel", "element_size")  # functions that give something, and do nothing else

_RANGES = ("range", "static_range")


def unused(text: Text) -> list[Edit]:
    """Take out assignments to local names that nothing reads, where finding the value does nothing else."""
    edits: dict[int, Edit] = {}
    for function in ast.walk(text.tree):
        if isinstance(function, ast.FunctionDef):
            is_idle = functools.partial(_is_idle, _read(function))
            is_kernel = any(name_of(decorator) == "jit" for decorator in map(_called, function.decorator_list))
            for suite in _suites(function):
                for statement in suite if len(suite) > 1 else ():
                    if (edit := _statement(text, statement, is_idle, is_kernel)) is not None:
                        edits.setdefault(edit.start, edit)
    return list(edits.values())


def _read(function: ast.FunctionDef) -> set[str]:
    """Names that something reads but what is put there itself."""
    counts = Counter(n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
    for statement in ast.walk(function):
        if isinstance(statement, ast.Assign) and isinstance(target := statement.targets[0], ast.Name):
            own = sum(isinstance(n, ast.Name) and n.id == target.id for n in ast.walk(statement.value))
            counts[target.id] -= own if len(statement.targets) == 1 else 0
    return {name for name, count in counts.items() if count}


def _statement(text: Text, statement: ast.stmt, is_idle, is_kernel: bool) -> Edit | None:
    if isinstance(statement, ast.For) and not statement.orelse:
        inner = [_statement(text, s, is_idle, is_kernel) for s in statement.body]
        is_whole = name_of(_called(statement.iter)) in _RANGES and all(e is not None and not e.text for e in inner)
        return Edit(*text.lines_with_comments(statement), b"") if is_whole else None
    if is_kernel and isinstance(statement, ast.AugAssign):
        # a pointer or a number, never a tensor that somebody else sees
        does_nothing = is_idle(statement.target, statement.value)
        return Edit(*text.lines_with_comments(statement), b"") if does_nothing else None
    return _without(text, statement, is_idle)


def _called(decorator: ast.expr) -> ast.expr:
    return getattr(decorator, "func", decorator)


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
    return isinstance(target, ast.Attribute) and target.attr in names and is_pure(value)


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
    return isinstance(target, ast.Name) and target.id not in read and is_pure(value)


def is_pure(value: ast.expr) -> bool:
    """Whether finding a value does nothing else."""
    return not any(map(_does, ast.walk(value)))


def _does(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return getattr(node.func, "attr", None) not in _IDLE
    return isinstance(node, (ast.Await, ast.Yield, ast.NamedExpr, ast.Starred))


def _suites(function: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(function):
        for field in ("body", "orelse", "finalbody"):
            if isinstance(suite := getattr(node, field, None), list):
                yield suite
