"""Source text without types, but for those that mean something when it runs: of fields, and of Triton's constants."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator

from hf_kvcache.hub.text import WIDTH, Edit, Text

_END = re.compile(rb"[\s,]*\)\s*:|\s*:")


def untyped(text: Text) -> Iterator[Edit]:
    """Take types out of signatures and of the assignments in functions; what is imported for them alone goes, too."""
    for node in ast.walk(text.tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            yield Edit(*text.whole_lines(node, node), b"")
        if not isinstance(node, ast.FunctionDef) or any("jit" in ast.unparse(d) for d in node.decorator_list):
            continue
        if node.returns is not None or any(arg.annotation is not None for arg in _arguments(node)):
            yield _signature(text, node)
        for inner in ast.walk(node):
            if isinstance(inner, ast.AnnAssign) and inner.value is not None:
                yield Edit(text.stop(inner.target), text.stop(inner.annotation), b"")


def _arguments(function: ast.FunctionDef) -> list[ast.arg]:
    return [node for node in ast.walk(function.args) if isinstance(node, ast.arg)]


def _signature(text: Text, function: ast.FunctionDef) -> Edit:
    """The head of a function up to the colon, on one line if it fits there."""
    args = copy.deepcopy(function.args)
    for node in ast.walk(args):
        if isinstance(node, ast.arg):
            node.annotation = None
    defaults = [*function.args.defaults, *filter(None, function.args.kw_defaults)]
    parts = [*_arguments(function), *defaults, *filter(None, [function.returns])]
    last = max(text.stop(part) for part in parts)
    stop = _END.match(text.text, last).end()
    inner, indent = ast.unparse(args).replace("'", '"'), " " * function.col_offset
    head = f"def {function.name}({inner}):"
    if len(indent + head) > WIDTH:
        lines = "".join(f"{indent}    {part},\n" for part in _parts(inner))
        head = f"def {function.name}(\n{lines}{indent}):"
    return Edit(text.start(function), stop, head.encode())


def _parts(inner: str) -> Iterator[str]:
    """The parameters of a signature, one by one; commas within brackets are part of a default."""
    depth, part = 0, ""
    for character in inner:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            yield part.strip()
            part = ""
        else:
            part += character
    yield part.strip()
