"""What expressions come to where some classes and functions do not exist."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

UNKNOWN = object()

_COMPARE = {ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.Eq: operator.eq, ast.NotEq: operator.ne}


class Known:
    """Values of expressions.

    Args:
        absent: names of classes and functions that do not exist, see `fold`.
        constants: local names that are one constant throughout the function that is looked at.
    """

    def __init__(self, absent: frozenset[str], constants: Mapping[str, Any] = MappingProxyType({})):
        self.absent, self.constants = absent, constants

    def within(self, function: ast.FunctionDef) -> Known:
        """The same where the names of a function count: what it calls so itself is not absent."""
        nodes = list(ast.walk(function))
        arguments = [node.arg for node in nodes if isinstance(node, ast.arg)]
        stores = arguments + [n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)]
        left = {name: value for name, value in self.constants.items() if name not in stores}
        return Known(self.absent - set(stores), left | self._constants(function, stores))

    def _constants(self, function: ast.FunctionDef, stores: list[str]) -> dict[str, Any]:
        """Local names that get, once, what something absent comes to."""
        found = {}
        for statement in function.body:
            target = statement.targets[0] if isinstance(statement, ast.Assign) else None
            if isinstance(target, ast.Name) and stores.count(target.id) == 1:
                if isinstance(statement.value, ast.Constant) and statement.value.value is None:
                    found[target.id] = None
        return found

    def value(self, node: ast.AST, is_test: bool = False) -> Any:
        """What an expression is, or UNKNOWN; where only its truth counts (`is_test`), something as true or false."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.constants.get(node.id, UNKNOWN)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            value = self.value(node.operand, True)
            return UNKNOWN if value is UNKNOWN else not value
        if isinstance(node, ast.BoolOp):
            return self._decided(node, is_test)
        if isinstance(node, ast.Compare):
            values = [self.value(x) for x in (node.left, *node.comparators)]
            found = [_compared(*three) for three in zip(node.ops, values, values[1:])]
            return False if False in found else UNKNOWN if UNKNOWN in found else True
        if isinstance(node, ast.NamedExpr):
            return self.value(node.value)
        if isinstance(node, ast.Call):
            if self.is_absent(node.func):
                return None
            if name_of(node.func) == "isinstance" and self.is_absent(node.args[1]):
                return False
        return UNKNOWN

    def is_absent(self, node: ast.AST) -> bool:
        return name_of(node) in self.absent and isinstance(node.ctx, ast.Load)

    def _decided(self, node: ast.BoolOp, is_test: bool) -> Any:
        decides = isinstance(node.op, ast.Or)
        values = [self.value(v, is_test) for v in node.values]
        for i, value in enumerate(values):
            if value is UNKNOWN or bool(value) is not decides:
                continue
            # what comes before is a truth value itself, or only the truth of it counts
            is_bare = value is False and all(map(_is_truth, node.values[:i]))
            if is_test or is_bare or UNKNOWN not in values[:i]:
                return value
        return UNKNOWN if any(value is UNKNOWN for value in values) else values[-1]


def name_of(node: ast.AST) -> str | None:
    """The name that is used, or the attribute."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)


def _is_truth(node: ast.expr) -> bool:
    return isinstance(node, ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))


def _compared(op: ast.cmpop, left: Any, right: Any) -> Any:
    """What a comparison comes to, or UNKNOWN."""
    return UNKNOWN if UNKNOWN in (left, right) or type(op) not in _COMPARE else _COMPARE[type(op)](left, right)
