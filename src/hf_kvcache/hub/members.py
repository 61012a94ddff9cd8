"""Which members of classes are reached, by the classes that there are instances of."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable
from functools import cache


class Members:
    """What is asked of instances.

    A member is reached if it is what an instance finds under a name that is used: one that is overridden in every class
    that is made is not, unless `super()` asks for it.

    Attributes:
        made: classes that may have instances of their own, not only of classes derived from them.
        names: used on anything.
        prefixes: of names that are put together.
    """

    def __init__(self):
        self.made: set[type] = set()
        self.names: set[str] = set()
        self.prefixes: tuple[str, ...] = ()
        # (class that the text is in, name)
        self._on_self: set[tuple[type, str]] = set()
        self._on_super: set[tuple[type, str]] = set()

    def enter(self, kind: type, statement: ast.stmt) -> None:
        """Note what a statement in the body of a class asks of `self` and of `super()`."""
        for node in ast.walk(statement):
            is_read = isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store)
            if is_read and (of := receiver(node)) is not None:
                (self._on_self if of == "self" else self._on_super).add((kind, node.attr))

    def reach(self, kind: type, name: str) -> bool:
        """Whether something finds this member in this very class."""
        for made in self.made:
            order = made.__mro__
            if kind not in order:
                continue
            if self._is_asked(made, name) and _first(order, name) is kind:
                return True
            if self._is_above(order, kind, name):
                return True
        return False

    def _is_above(self, order: tuple[type, ...], kind: type, name: str) -> bool:
        return any(
            asked == name and below in order and _first(order[order.index(below) + 1 :], name) is kind
            for below, asked in self._on_super
        )

    def is_foreign(self, kind: type, name: str) -> bool:
        """Whether a class that is not ours has it, too: transformers and torch will ask for it."""
        return any(name in vars(base) for base in foreign(kind))

    def _is_asked(self, made: type, name: str) -> bool:
        is_dunder = name.startswith("__") and name.endswith("__")
        is_named = name in self.names or (self.prefixes and name.startswith(self.prefixes))
        if is_dunder or is_named or self.is_foreign(made, name):
            return True
        return any(asked == name and kind in made.__mro__ for kind, asked in self._on_self)


def receiver(node: ast.Attribute) -> str | None:
    """ "self" or "super" where an attribute is asked of it."""
    value = node.value
    if isinstance(value, ast.Name) and value.id == "self":
        return "self"
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super":
        return "super"
    return None


def _first(order: tuple[type, ...], name: str) -> type | None:
    """The class that a name is found in."""
    return next((kind for kind in order if name in vars(kind)), None)


def foreign(kind: type) -> list[type]:
    """The bases of a class that are not ours."""
    return [base for base in kind.__mro__ if not base.__module__.startswith("hf_kvcache") and base is not object]


def is_mentioned(name: str, kinds: Iterable[type]) -> bool:
    """Whether the modules of other libraries' classes speak of a name: they may read or write it."""
    return any(hasattr(kind, name) or name in _source(kind.__module__) for kind in kinds)


@cache
def _source(module: str) -> str:
    return "" if module == "builtins" else inspect.getsource(sys.modules[module])
