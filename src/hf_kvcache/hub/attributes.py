"""What is put into attributes, and what is read of them, as far as code is reached."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from hf_kvcache.hub.values import UNKNOWN


class Attributes:
    """Stores and reads of attributes by name, whichever object they are of.

    Attributes:
        stores: the constants that are put there, UNKNOWN for anything else.
        on_self, elsewhere: names that are read of `self`, and of something else.
        texts: identifiers in string constants, which may be names of attributes.
    """

    def __init__(self):
        self.stores: dict[str, list[Any]] = {}
        self.on_self: set[str] = set()
        self.elsewhere: set[str] = set()
        self.texts: set[str] = set()

    def note(self, nodes: Iterable[ast.AST]) -> None:
        """Look at nodes that run."""
        nodes, seen = list(nodes), set()
        for node in nodes:
            for target, value in stored(node):
                if isinstance(target, ast.Attribute):
                    seen.add(id(target))
                    constant = value.value if isinstance(value, ast.Constant) else UNKNOWN
                    self.stores.setdefault(target.attr, []).append(constant)
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                self.texts.add(node.value)
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Attribute):
                self.elsewhere.add(node.target.attr)
            if not isinstance(node, ast.Attribute) or id(node) in seen:
                continue
            if isinstance(node.ctx, ast.Load):
                is_own = isinstance(node.value, ast.Name) and node.value.id == "self"
                (self.on_self if is_own else self.elsewhere).add(node.attr)
            else:
                self.stores.setdefault(node.attr, []).append(UNKNOWN)

    def constant(self) -> dict[str, Any]:
        """Those that only `self` is asked for, and that hold one constant whenever they are."""
        found = {
            name: values[0]
            for name, values in self.stores.items()
            if values[0] is not UNKNOWN and all(value is values[0] for value in values)
        }
        return {name: value for name, value in found.items() if name not in self.elsewhere | self.texts}

    def unread(self) -> set[str]:
        """Those that nothing asks for."""
        return self.stores.keys() - self.on_self - self.elsewhere - self.texts


def stored(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Targets of an assignment with what each of them gets."""
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        yield node.target, node.value
    for target in node.targets if isinstance(node, ast.Assign) else ():
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            if len(target.elts) == len(node.value.elts):
                yield from zip(target.elts, node.value.elts, strict=True)
        else:
            yield target, node.value


def is_mentioned(name: str, kinds: Iterable[type]) -> bool:
    """Whether the modules of other libraries' classes speak of a name: they may read or write it."""
    return any(hasattr(kind, name) or name in _source(kind.__module__) for kind in kinds)


@cache
def _source(module: str) -> str:
    # what is built in has no source, and does not know our names
    return "" if module in sys.builtin_module_names else inspect.getsource(sys.modules[module])
