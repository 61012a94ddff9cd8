"""Parameters that functions do not read: they go, and so do the arguments of every call."""

from __future__ import annotations

import ast
from collections.abc import Collection

from hf_kvcache.hub.text import Edit, Text
from hf_kvcache.hub.unused import is_pure


def unread_parameters(text: Text, asked: Collection[str]) -> list[Edit]:
    """Edits for one function of a module, and none where nothing is left to do.

    Args:
        text: the module.
        asked: names that other modules ask it for, whose calls are not all in sight.
    """
    for function in text.tree.body:
        if isinstance(function, ast.FunctionDef) and function.name not in asked:
            calls = _calls(text, function.name)
            for i in _unread(function) if calls is not None else ():
                if all(is_pure(call.args[i]) for call in calls):
                    edits = [_without(text, part, i) for part in (function.args.args, *(call.args for call in calls))]
                    if _are_apart(edits):
                        return edits
    return []


def _calls(text: Text, name: str) -> list[ast.Call] | None:
    """All calls of a function, if nothing else is done with it and they give one argument after another."""
    calls = [n for n in ast.walk(text.tree) if isinstance(n, ast.Call) and getattr(n.func, "id", None) == name]
    uses = [n for n in ast.walk(text.tree) if isinstance(n, ast.Name) and n.id == name]
    is_plain = not any(call.keywords or any(isinstance(a, ast.Starred) for a in call.args) for call in calls)
    return calls if calls and is_plain and len(uses) == len(calls) else None


def _unread(function: ast.FunctionDef) -> list[int]:
    """Places of parameters that nothing in a function speaks of, where all of them are plain."""
    args = function.args
    if args.vararg or args.kwarg or args.kwonlyargs or args.defaults or len(args.args) < 2:
        return []
    spoken = {n.id for statement in function.body for n in ast.walk(statement) if isinstance(n, ast.Name)}
    return [i for i, arg in enumerate(args.args) if arg.arg not in spoken]


def _without(text: Text, parts: list[ast.AST], i: int) -> Edit:
    """Take the `i`-th of several parts out, with a comma."""
    ends_line = i + 1 == len(parts) or parts[i + 1].lineno != parts[i].end_lineno
    begins_line = i == 0 or parts[i - 1].end_lineno != parts[i].lineno
    if i + 1 < len(parts) and (begins_line or not ends_line):
        return Edit(text.start(parts[i]), text.start(parts[i + 1]), b"")
    return Edit(text.stop(parts[i - 1]), text.stop(parts[i]), b"")


def _are_apart(edits: list[Edit]) -> bool:
    ordered = sorted(edits)
    return all(a.stop <= b.start for a, b in zip(ordered, ordered[1:]))
