"""Parameters and attributes that always have one value: they go, and the value is put where they are read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hf_kvcache.hub.text import Edit, Text, until_done

_AFTER = re.compile(rb"\s*,\s*(?!\s*\))")
_BEFORE = re.compile(rb",\s*$")
_STAR = re.compile(rb",\s*\*\s*,\s*$")


def settle(source: str, fixed: Mapping[str, Any]) -> str:
    """Take parameters, keyword arguments and attributes of these names out of a module.

    Args:
        source: the module.
        fixed: values by name, of parameters that only keywords give, and of attributes.
    """
    text = until_done(Text(source.encode()), lambda text: _reads(text, fixed))
    return until_done(text, lambda text: _writes(text, fixed)).text.decode()


def _reads(text: Text, fixed: Mapping[str, Any]) -> Iterator[Edit]:
    nodes = [node for node in ast.walk(text.tree) if isinstance(node, ast.Attribute)]
    for function in ast.walk(text.tree):
        if isinstance(function, ast.FunctionDef):
            own = {arg.arg for arg, _ in _parameters(function)}
            nodes += [node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id in own]
    for node in nodes:
        name = node.attr if isinstance(node, ast.Attribute) else node.id
        if name in fixed and isinstance(node.ctx, ast.Load):
            yield Edit(text.start(node), text.stop(node), repr(fixed[name]).encode())


def _writes(text: Text, fixed: Mapping[str, Any]) -> Iterator[Edit]:
    for node in ast.walk(text.tree):
        if isinstance(node, ast.FunctionDef):
            for arg, default in _parameters(node):
                if arg.arg in fixed:
                    is_starred = node.args.kwonlyargs == [arg]
                    yield _part(text, text.start(arg), text.stop(default or arg), _STAR if is_starred else _BEFORE)
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in fixed and isinstance(keyword.value, (ast.Constant, ast.Dict)):
                    yield _part(text, text.start(keyword), text.stop(keyword), _BEFORE)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            yield from _assignment(text, node, fixed)


def _parameters(function: ast.FunctionDef) -> list[tuple[ast.arg, ast.expr | None]]:
    """Parameters that only keywords give, with their defaults; of `__init__` all that have one."""
    args = function.args
    optional = args.args[len(args.args) - len(args.defaults) :] if function.name == "__init__" else []
    return [*zip(optional, args.defaults), *zip(args.kwonlyargs, args.kw_defaults, strict=True)]


def _part(text: Text, start: int, stop: int, before: re.Pattern) -> Edit:
    """One part of a list, with the comma behind it, or the one before it."""
    after = None if before is _STAR else _AFTER.match(text.text, stop)
    if after is not None:
        return Edit(start, after.end(), b"")
    found = before.search(text.text[:start])
    return Edit(start if found is None else found.start(), stop, b"")


def _assignment(text: Text, node: ast.Assign | ast.AnnAssign, fixed: Mapping[str, Any]) -> Iterator[Edit]:
    """Leave out targets that are fixed attributes, alone or side by side with others."""
    targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
    target, value = targets[0], node.value
    if len(targets) > 1:
        return
    if _is_fixed(target, fixed):
        yield Edit(*text.lines_with_comments(node), b"")
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        pairs = list(zip(target.elts, value.elts, strict=True))
        left = [pair for pair in pairs if not _is_fixed(pair[0], fixed)]
        if not left:
            yield Edit(*text.lines_with_comments(node), b"")
        elif len(left) < len(pairs):
            sides = (b", ".join(text.of(part) for part in side) for side in zip(*left, strict=True))
            yield Edit(text.start(node), text.stop(node), b" = ".join(sides))


def _is_fixed(target: ast.expr, fixed: Mapping[str, Any]) -> bool:
    return isinstance(target, ast.Attribute) and target.attr in fixed
