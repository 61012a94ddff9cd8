"""What expressions come to where some names are known."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

UNKNOWN = object()


class Something:
    """Known to be there, and to be true; not what it is."""


SOMETHING = Something()

_COMPARE = {
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.Lt: operator.lt,
    ast.GtE: operator.ge,
    ast.LtE: operator.le,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_ASKS_TEXT = ("startswith", "endswith")
_EMPTY = {ast.Dict: {}, ast.DictComp: {}, ast.List: [], ast.ListComp: [], ast.Tuple: (), ast.GeneratorExp: ()}


class Trivial(NamedTuple):
    """Functions whose calls come to something that is known, by name.

    Attributes:
        values: what they return.
        same: those that return their only argument.
        attributes: what properties return, and what attributes hold, always.
        unread: attributes that nothing reads.
    """

    values: Mapping[str, Any] = MappingProxyType({})
    same: frozenset[str] = frozenset()
    attributes: Mapping[str, Any] = MappingProxyType({})
    unread: frozenset[str] = frozenset()

    def __or__(self, more: Trivial) -> Trivial:
        values, attributes = {**self.values, **more.values}, {**self.attributes, **more.attributes}
        return Trivial(values, self.same | more.same, attributes, self.unread | more.unread)


class Known:
    """Values of expressions.

    Args:
        facts, absent, trivial: see `fold`.
    """

    def __init__(self, facts: Mapping[str, Any], absent: frozenset[str], trivial: Trivial):
        self.facts, self.absent, self.trivial = facts, absent, trivial

    def within(self, function: ast.FunctionDef) -> Known:
        """The same where the names of a function count."""
        nodes = list(ast.walk(function))
        arguments = [node.arg for node in nodes if isinstance(node, ast.arg)]
        stores = arguments + [n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)]
        return Known(self.facts | _constants(function, nodes, stores), self.absent - set(stores), self.trivial)

    def value(self, node: ast.AST, is_test: bool = False) -> Any:
        """What an expression is, or UNKNOWN; where only its truth counts (`is_test`), something as true or false."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.facts.get(node.id, UNKNOWN)
        if isinstance(node, ast.Attribute):
            found = self.facts.get(f".{node.attr}", self.facts.get(node.attr, UNKNOWN))
            return self.trivial.attributes.get(node.attr, UNKNOWN) if found is UNKNOWN else found
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
            return self._called(node)
        if type(node) in _EMPTY and self.is_empty(node):
            return _EMPTY[type(node)]
        if isinstance(node, ast.Tuple) and UNKNOWN not in (values := tuple(map(self.value, node.elts))):
            return values
        return UNKNOWN

    def is_empty(self, node: ast.AST) -> bool:
        """Whether there is nothing in it to go over: `range(0)`, Triton's `tl.static_range(0)`, a container."""
        if isinstance(node, ast.Call) and name_of(node.func) in ("range", "static_range"):
            return len(node.args) == 1 and self.value(node.args[0]) == 0
        if isinstance(node, (ast.ListComp, ast.DictComp, ast.GeneratorExp)):
            return any(
                self.is_empty(of.iter) or any(self.value(test, True) in (False, None) for test in of.ifs)
                for of in node.generators
            )
        if isinstance(node, ast.Dict):
            return not node.values
        if isinstance(node, (ast.Tuple, ast.List)):
            return not node.elts
        return not isinstance(node, ast.Constant) and self.value(node) in ({}, [], ())

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

    def _called(self, node: ast.Call) -> Any:
        name = name_of(node.func)
        if self.is_absent(node.func):
            return None
        if name in self.trivial.values:
            return self.trivial.values[name]
        if isinstance(node.func, ast.Attribute):
            return self._method(node, name)
        if name == "isinstance" and self.is_absent(node.args[1]):
            return False
        if len(node.args) == 1 and name in ("dict", "sum", "max") and self.is_empty(node.args[0]):
            if name == "max":
                return next((self.value(k.value) for k in node.keywords if k.arg == "default"), UNKNOWN)
            return UNKNOWN if node.keywords else {} if name == "dict" else 0
        if name == "max" and len(node.args) > 1 and not node.keywords:
            values = [self.value(x) for x in node.args]
            return max(values) if all(type(value) is int for value in values) else UNKNOWN
        return UNKNOWN

    def _method(self, node: ast.Call, name: str) -> Any:
        of = node.func.value
        if name in _ASKS_TEXT:
            text, what = self.value(of), self.value(node.args[0])
            return getattr(text, name)(what) if isinstance(text, str) and isinstance(what, str) else UNKNOWN
        if name in ("items", "values", "keys") and not node.args and self.is_empty(of):
            return ()
        if name == "fromkeys" and name_of(of) == "dict" and self.is_empty(node.args[0]):
            return {}
        return UNKNOWN


def name_of(node: ast.AST) -> str | None:
    """The name that is used, or the attribute."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)


def _is_truth(node: ast.expr) -> bool:
    return isinstance(node, ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))


def _compared(op: ast.cmpop, left: Any, right: Any) -> Any:
    """What a comparison comes to, or UNKNOWN."""
    if UNKNOWN in (left, right) or type(op) not in _COMPARE:
        return UNKNOWN
    if SOMETHING in (left, right):
        # it is true, and nothing else is known of it
        other = right if left is SOMETHING else left
        if other or not isinstance(op, (ast.Is, ast.IsNot, ast.Eq, ast.NotEq)):
            return UNKNOWN
        return isinstance(op, (ast.IsNot, ast.NotEq))
    return _COMPARE[type(op)](left, right)


def _constants(function: ast.FunctionDef, nodes: list[ast.AST], stores: list[str]) -> dict[str, Any]:
    """Local names that are a constant throughout, or something empty that nothing is put into.

    Args:
        nodes: of the function.
        stores: names that are put somewhere in it, as often as they are.
    """
    # something is asked of it, or put into it
    used = {
        node.value.id
        for node in nodes
        if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.value, ast.Name)
    }
    found = {}
    for statement in function.body:
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)):
            continue
        target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
        if not isinstance(target, ast.Name) or stores.count(target.id) != 1:
            continue
        value = statement.value
        if isinstance(value, ast.Constant):
            found[target.id] = value.value
        elif isinstance(value, (ast.Dict, ast.List, ast.Tuple)) and target.id not in used:
            if not (value.values if isinstance(value, ast.Dict) else value.elts):
                found[target.id] = _EMPTY[type(value)]
    return found
