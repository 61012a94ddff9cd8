"""Source text in which some conditions are known: branches that cannot run are taken out, the rest stays as it is."""

from __future__ import annotations

import ast
import operator
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
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


class Edit(NamedTuple):
    """Bytes `[start, stop)` of a source text, and what comes in their place."""

    start: int
    stop: int
    text: bytes


class Trivial(NamedTuple):
    """Functions whose calls come to something that is known, by name.

    Attributes:
        values: what they return.
        same: those that return their only argument.
    """

    values: Mapping[str, Any] = MappingProxyType({})
    same: frozenset[str] = frozenset()


def fold(source: str, facts: Mapping[str, Any], absent: Collection[str] = (), trivial: Trivial | None = None) -> str:
    """Take out what cannot run.

    Args:
        source: a module.
        facts: what names and attributes are, wherever the module reads them: `{"policy": None}` settles
            `self.policy is None`; ".policy" is about attributes alone, and SOMETHING is neither None nor false.
        absent: names of classes, functions and methods that will not exist: nothing is an instance of them, calls come
            to None, containers go without them, and branches that return them are never taken.
        trivial: functions whose calls are replaced.

    Raises:
        SyntaxError: the source cannot be read.
    """
    text, trivial = source.encode(), Trivial() if trivial is None else trivial
    while edits := _Search(Text(text), dict(facts), frozenset(absent), trivial).edits():
        for edit in reversed(edits):
            text = text[: edit.start] + edit.text + text[edit.stop :]
    return text.decode()


class Text:
    """A source text and where its nodes are.

    Args:
        text: UTF-8.
    """

    def __init__(self, text: bytes):
        self.text, self.tree = text, ast.parse(text)
        self.lines = [0]
        for line in text.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))

    @cached_property
    def tests(self) -> set[int]:
        """Expressions of which only the truth counts, by id."""
        todo, found = [], set()
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
                todo.append(node.test)
            elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
                todo.append(node.operand)
            todo += getattr(node, "ifs", ())
        while todo:
            node = todo.pop()
            found.add(id(node))
            todo += node.values if isinstance(node, ast.BoolOp) else []
        return found

    def start(self, node: ast.AST) -> int:
        return self.lines[node.lineno - 1] + node.col_offset

    def stop(self, node: ast.AST) -> int:
        return self.lines[node.end_lineno - 1] + node.end_col_offset

    def of(self, node: ast.AST) -> bytes:
        return self.text[self.start(node) : self.stop(node)]

    def first_line(self, node: ast.AST) -> int:
        """Index of the line that a statement begins on, decorators included."""
        return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1

    def whole_lines(self, first: ast.AST, last: ast.AST) -> tuple[int, int]:
        """Where the lines of statements begin, and where the next one does."""
        return self.lines[self.first_line(first)], self.lines[last.end_lineno]

    def lines_with_comments(self, node: ast.AST) -> tuple[int, int]:
        """The same of one statement with the comments above it."""
        first, (start, stop) = self.first_line(node), self.whole_lines(node, node)
        while first and self.text[self.lines[first - 1] : start].lstrip().startswith(b"#"):
            first -= 1
            start = self.lines[first]
        return start, stop


class _Search:
    """Finds what to take out next, the outermost first.

    Args:
        at: the text.
        facts, absent, trivial: see `fold`.
    """

    def __init__(self, at: Text, facts: Mapping[str, Any], absent: frozenset[str], trivial: Trivial):
        self.at, self.facts, self.absent, self.trivial = at, facts, absent, trivial
        self.tests = at.tests

    def edits(self) -> list[Edit]:
        """One edit of every function, which do not touch each other, in their order; or one of what is around them."""
        found = [edit for function in _outermost(self.at.tree) if (edit := self._of_function(function)) is not None]
        if not found and (edit := self._edit(self.at.tree)) is not None:
            found = [edit]
        return sorted(found)

    def _of_function(self, function: ast.FunctionDef) -> Edit | None:
        known = self.facts | _constants(function), self.absent - _stored(function)
        return _Search(self.at, *known, self.trivial)._edit(function)

    def _edit(self, within: ast.AST) -> Edit | None:
        todo = [within]
        while todo:
            node = todo.pop(0)
            if isinstance(node, ast.FunctionDef) and node is not within:
                if isinstance(within, ast.FunctionDef) and (edit := self._of_function(node)) is not None:
                    return edit
                continue
            for field in ("body", "orelse", "finalbody"):
                suite = getattr(node, field, None)
                if isinstance(suite, list) and (edit := self._suite(suite)) is not None:
                    return edit
            if (edit := self._expression(node)) is not None:
                return edit
            todo += ast.iter_child_nodes(node)
        return None

    # -- statements --------------------------------------------------------------------------------------------------

    def _suite(self, suite: list[ast.stmt]) -> Edit | None:
        for i, statement in enumerate(suite):
            if isinstance(statement, ast.If):
                value = False if self._returns_absent(statement.body) else self.value(statement.test, True)
                if value is not UNKNOWN:
                    return self._branch(statement, bool(value), is_alone=len(suite) == 1)
            if isinstance(statement, ast.ImportFrom) and statement.col_offset:
                if all(alias.name in self.absent for alias in statement.names):
                    return self._put(statement, b'raise ImportError("this repository does without it")')
            if self._is_idle(statement):
                start, stop = self.at.lines_with_comments(statement)
                return Edit(start, stop, b" " * statement.col_offset + b"pass\n" if len(suite) == 1 else b"")
            if isinstance(statement, (ast.Return, ast.Raise, ast.Continue, ast.Break)) and suite[i + 1 :]:
                start, stop = self.at.lines[statement.end_lineno], self.at.lines[suite[-1].end_lineno]
                return Edit(start, stop, b"")
        return None

    def _is_idle(self, statement: ast.stmt) -> bool:
        """Whether a statement does nothing: a call of what is absent, a loop around nothing."""
        if isinstance(statement, ast.For):
            return self._is_empty(statement.iter) or all(isinstance(inner, ast.Pass) for inner in statement.body)
        call = statement.value if isinstance(statement, ast.Expr) else None
        return isinstance(call, ast.Call) and self._is_absent(call.func)

    def _is_empty(self, node: ast.expr) -> bool:
        """Whether a loop goes over nothing: `range(0)`, or Triton's `tl.static_range(0)`."""
        is_range = isinstance(node, ast.Call) and self._name(node.func) in ("range", "static_range")
        return is_range and len(node.args) == 1 and self.value(node.args[0]) == 0

    def _returns_absent(self, body: list[ast.stmt]) -> bool:
        only = body[-1]
        return isinstance(only, ast.Return) and isinstance(only.value, ast.Name) and only.value.id in self.absent

    def _branch(self, node: ast.If, is_taken: bool, is_alone: bool) -> Edit:
        """Put what an `if` comes to in its place."""
        at, indent = self.at, node.col_offset
        start, stop = at.whole_lines(node, node)
        is_elif = at.text[at.start(node) :].startswith(b"elif")
        body = node.body if is_taken else node.orelse
        if not body:
            return Edit(start, stop, b" " * indent + b"pass\n" if is_alone and not is_elif else b"")
        chain = not is_taken and len(body) == 1 and at.text[at.start(body[0]) :].startswith(b"elif")
        if chain:
            rest = at.text[at.whole_lines(body[0], body[0])[0] : stop]
            return Edit(start, stop, rest if is_elif else rest.replace(b"elif", b"if", 1))
        first = at.lines_with_comments(body[0])[0]
        lines = at.text[first : at.lines[body[-1].end_lineno]]
        if is_elif:
            return Edit(start, stop, b" " * indent + b"else:\n" + lines)
        return Edit(start, stop, _dedented(lines, body[0].col_offset - indent))

    # -- expressions -------------------------------------------------------------------------------------------------

    def _expression(self, node: ast.AST) -> Edit | None:
        at = self.at
        if isinstance(node, ast.IfExp) and (value := self.value(node.test, True)) is not UNKNOWN:
            return self._put(node, at.of(node.body if value else node.orelse))
        if isinstance(node, ast.IfExp) and isinstance(node.body, ast.Name) and self._is_absent(node.body):
            return self._put(node, at.of(node.orelse))
        is_test = id(node) in self.tests
        if isinstance(node, (ast.BoolOp, ast.Compare, ast.UnaryOp, ast.Call)):
            is_number = isinstance(getattr(node, "op", None), (ast.USub, ast.UAdd))
            value = UNKNOWN if is_number else self.value(node, is_test)
            if value is not UNKNOWN and (is_test or value is not SOMETHING):
                return self._put(node, repr(True if value is SOMETHING else value).encode())
        if isinstance(node, ast.Call) and self._name(node.func) in self.trivial.same and len(node.args) == 1:
            inner = node.args[0]
            if not node.keywords and not isinstance(inner, ast.Starred):
                is_atom = isinstance(inner, (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Constant))
                return self._put(node, at.of(inner) if is_atom else b"(" + at.of(inner) + b")")
        if isinstance(node, ast.BoolOp):
            # the others say what comes out; the last one is what comes out, unless only its truth counts
            passed = isinstance(node.op, ast.And)
            left = [
                v
                for v in node.values
                if (v is node.values[-1] and not is_test)
                or (known := self.value(v, is_test)) is UNKNOWN
                or bool(known) is not passed
            ]
            if len(left) < len(node.values):
                word = b" and " if passed else b" or "
                return self._put(node, word.join(self._operand(v) for v in left))
        if isinstance(node, ast.Dict):
            gone = [i for i, v in enumerate(node.values) if self._is_absent(v)]
            if gone:
                pairs = [i for i in range(len(node.values)) if i not in gone]
                inner = b", ".join(at.of(node.keys[i]) + b": " + at.of(node.values[i]) for i in pairs)
                return self._put(node, b"{" + inner + b"}")
        if isinstance(node, (ast.Tuple, ast.List)) and any(map(self._is_absent, node.elts)):
            left = [at.of(e) for e in node.elts if not self._is_absent(e)]
            inner = b", ".join(left) + (b"," if isinstance(node, ast.Tuple) and len(left) == 1 else b"")
            return self._put(node, b"(%s)" % inner if isinstance(node, ast.Tuple) else b"[%s]" % inner)
        return None

    def _operand(self, node: ast.AST) -> bytes:
        """An operand of `and` or `or`, in the brackets that it may have had."""
        text = self.at.of(node)
        return b"(" + text + b")" if isinstance(node, (ast.BoolOp, ast.IfExp, ast.NamedExpr)) else text

    def _put(self, node: ast.AST, text: bytes) -> Edit:
        return Edit(self.at.start(node), self.at.stop(node), text)

    @staticmethod
    def _name(node: ast.AST) -> str | None:
        return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)

    def _is_absent(self, node: ast.AST) -> bool:
        return self._name(node) in self.absent and isinstance(node.ctx, ast.Load)

    def value(self, node: ast.AST, is_test: bool = False) -> Any:
        """What an expression is, or UNKNOWN; where only its truth counts (`is_test`), something as true or false."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.facts.get(node.id, UNKNOWN)
        if isinstance(node, ast.Attribute):
            return self.facts.get(f".{node.attr}", self.facts.get(node.attr, UNKNOWN))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            value = self.value(node.operand, True)
            return UNKNOWN if value is UNKNOWN else not value
        if isinstance(node, ast.BoolOp):
            decides = isinstance(node.op, ast.Or)
            values = [self.value(v, is_test) for v in node.values]
            for i, value in enumerate(values):
                if value is not UNKNOWN and bool(value) is decides and (is_test or UNKNOWN not in values[:i]):
                    return value
            return UNKNOWN if any(value is UNKNOWN for value in values) else values[-1]
        if isinstance(node, ast.Compare):
            values = [self.value(x) for x in (node.left, *node.comparators)]
            found = [_compared(*three) for three in zip(node.ops, values, values[1:])]
            return False if False in found else UNKNOWN if UNKNOWN in found else True
        if isinstance(node, ast.NamedExpr):
            return self.value(node.value)
        if isinstance(node, ast.Call) and self._is_absent(node.func):
            return None
        if isinstance(node, ast.Call) and self._name(node.func) in self.trivial.values:
            return self.trivial.values[self._name(node.func)]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _ASKS_TEXT:
            of, what = (self.value(x) for x in (node.func.value, node.args[0]))
            return getattr(of, node.func.attr)(what) if isinstance(of, str) and isinstance(what, str) else UNKNOWN
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            if self._is_absent(node.args[1]):
                return False
        return UNKNOWN


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


def _outermost(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Functions and methods that are in no other."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef):
            yield node
        else:
            todo += ast.iter_child_nodes(node)


def _stored(function: ast.FunctionDef) -> set[str]:
    """Names that are local to a function."""
    names = {arg.arg for arg in ast.walk(function.args) if isinstance(arg, ast.arg)}
    return names | {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}


def _constants(function: ast.FunctionDef) -> dict[str, Any]:
    """Local names that are a constant throughout."""
    stores = [n.id for n in ast.walk(function) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)]
    stores += [arg.arg for arg in ast.walk(function.args) if isinstance(arg, ast.arg)]
    found = {}
    for statement in function.body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and isinstance(statement.value, ast.Constant):
            target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
            if isinstance(target, ast.Name) and stores.count(target.id) == 1:
                found[target.id] = statement.value.value
    return found


def returned(node: ast.AST) -> ast.expr | None:
    """What a function returns that does nothing else."""
    if not isinstance(node, ast.FunctionDef) or node.decorator_list:
        return None
    body = node.body[ast.get_docstring(node) is not None :]
    return body[0].value if len(body) == 1 and isinstance(body[0], ast.Return) else None


def does_nothing(node: ast.AST) -> bool:
    """Whether a node is a function that returns at once."""
    if not isinstance(node, ast.FunctionDef):
        return False
    body = node.body[ast.get_docstring(node) is not None :]
    return bool(body) and all(
        isinstance(s, ast.Pass) or (isinstance(s, ast.Return) and _is_none(s.value)) for s in body
    )


def only_checks(node: ast.FunctionDef) -> bool:
    """Whether a `__post_init__` does nothing but refuse values, which were fit when a repository was made of them."""
    does = (ast.Attribute, ast.Subscript)
    return node.name == "__post_init__" and not any(
        isinstance(inner, ast.Expr)
        and isinstance(inner.value, ast.Call)
        or isinstance(inner, does)
        and not isinstance(inner.ctx, ast.Load)
        for inner in ast.walk(node)
    )


def _is_none(node: ast.expr | None) -> bool:
    return node is None or (isinstance(node, ast.Constant) and node.value is None)


def _dedented(lines: bytes, by: int) -> bytes:
    """Lines further to the left by as many spaces, as far as they have them."""
    moved = [line[by:] if line[:by].isspace() else line.lstrip(b" ") for line in lines.splitlines(keepends=True)]
    return b"".join(moved)
