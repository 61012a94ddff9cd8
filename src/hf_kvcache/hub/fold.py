"""Source text without what does not exist: branches that only it leads to are taken out, the rest stays as it is."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator

from hf_kvcache.hub.text import Edit, Text
from hf_kvcache.hub.values import UNKNOWN, Known, name_of

_MAY_BE_KNOWN = (ast.BoolOp, ast.Compare, ast.UnaryOp, ast.Call)


def fold(source: str, absent: Collection[str]) -> str:
    """Take out what cannot run.

    Functions that do not speak of anything absent stay as they are, byte for byte.

    Args:
        source: a module.
        absent: names of classes, functions and methods that will not exist: nothing is an instance of them, calls come
            to None, containers go without them, and branches that return them are never taken.

    Raises:
        SyntaxError: the source cannot be read.
    """
    text, known = Text(source.encode()), Known(frozenset(absent))
    done = {text.of(function) for function in _outermost(text.tree) if not _speaks_of(function, absent)}
    while edits := _Search(text, known).edits(done):
        text = text.edited(edits)
    return text.text.decode()


class _Search:
    """Finds what to take out next, the outermost first.

    Args:
        at: the text.
        known: what expressions in it come to.
    """

    def __init__(self, at: Text, known: Known):
        self.at, self.known, self.tests = at, known, at.tests

    def edits(self, done: set[bytes]) -> list[Edit]:
        """One edit of every function, which do not touch each other, in their order; or one of what is around them.

        `done` are functions, as text, in which there is nothing to find any more.
        """
        found = []
        for function in _outermost(self.at.tree):
            if (source := self.at.of(function)) in done:
                continue
            if (edit := self._of_function(function)) is None:
                done.add(source)
            else:
                found.append(edit)
        if not found and (edit := self._edit(self.at.tree)) is not None:
            found = [edit]
        return sorted(found)

    def _of_function(self, function: ast.FunctionDef) -> Edit | None:
        return _Search(self.at, self.known.within(function))._edit(function)

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
                value = False if self._returns_absent(statement.body) else self.known.value(statement.test, True)
                if value is not UNKNOWN:
                    return self._branch(statement, bool(value), is_alone=len(suite) == 1)
            if isinstance(statement, ast.ImportFrom) and statement.col_offset:
                if all(alias.name in self.known.absent for alias in statement.names):
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
            return all(isinstance(inner, ast.Pass) for inner in statement.body)
        call = statement.value if isinstance(statement, ast.Expr) else None
        return isinstance(call, ast.Call) and self.known.is_absent(call.func)

    def _returns_absent(self, body: list[ast.stmt]) -> bool:
        only = body[-1]
        return isinstance(only, ast.Return) and isinstance(only.value, ast.Name) and only.value.id in self.known.absent

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
        if isinstance(node, ast.IfExp) and (value := self.known.value(node.test, True)) is not UNKNOWN:
            return self._put(node, at.of(node.body if value else node.orelse))
        if isinstance(node, ast.IfExp):
            sides = (node.body, node.orelse), (node.orelse, node.body)
            left = next((other for side, other in sides if self._is_never(side)), None)
            if left is not None:
                return self._put(node, at.of(left))
        is_test = id(node) in self.tests
        if isinstance(node, _MAY_BE_KNOWN):
            value = self.known.value(node, is_test)
            if value is not UNKNOWN:
                return self._put(node, repr(value).encode())
        if isinstance(node, ast.BoolOp):
            # the others say what comes out; the last one is what comes out, unless only its truth counts
            passed = isinstance(node.op, ast.And)
            left = [
                v
                for v in node.values
                if (v is node.values[-1] and not is_test)
                or (known := self.known.value(v, is_test)) is UNKNOWN
                or bool(known) is not passed
            ]
            if len(left) < len(node.values):
                word = b" and " if passed else b" or "
                return self._put(node, word.join(self._operand(v) for v in left))
        if isinstance(node, ast.Dict):
            pairs = list(zip(node.keys, node.values, strict=True))
            left = [(k, v) for k, v in pairs if k is None or not self.known.is_absent(v)]
            if len(left) < len(pairs):
                parts = [(b"**" if k is None else at.of(k) + b": ") + at.of(v) for k, v in left]
                return self._put(node, b"{" + b", ".join(parts) + b"}")
        if isinstance(node, (ast.Tuple, ast.List)) and any(map(self.known.is_absent, node.elts)):
            left = [at.of(e) for e in node.elts if not self.known.is_absent(e)]
            inner = b", ".join(left) + (b"," if isinstance(node, ast.Tuple) and len(left) == 1 else b"")
            return self._put(node, b"(%s)" % inner if isinstance(node, ast.Tuple) else b"[%s]" % inner)
        return None

    def _is_never(self, side: ast.expr) -> bool:
        """Whether one side of a choice is something absent, or a call of it."""
        of = side.func if isinstance(side, ast.Call) else side
        return isinstance(of, (ast.Name, ast.Attribute)) and self.known.is_absent(of)

    def _operand(self, node: ast.AST) -> bytes:
        """An operand of `and` or `or`, in the brackets that it may have had."""
        text = self.at.of(node)
        return b"(" + text + b")" if isinstance(node, (ast.BoolOp, ast.IfExp, ast.NamedExpr)) else text

    def _put(self, node: ast.AST, text: bytes) -> Edit:
        return Edit(self.at.start(node), self.at.stop(node), text)


def _outermost(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Functions and methods that are in no other."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef):
            yield node
        else:
            todo += ast.iter_child_nodes(node)


def _speaks_of(function: ast.FunctionDef, names: Collection[str]) -> bool:
    nodes = list(ast.walk(function))
    imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return any(name_of(node) in names for node in nodes) or not imported.isdisjoint(names)


def _dedented(lines: bytes, by: int) -> bytes:
    """Lines further to the left by as many spaces, as far as they have them."""
    moved = [line[by:] if line[:by].isspace() else line.lstrip(b" ") for line in lines.splitlines(keepends=True)]
    return b"".join(moved)
