"""Source text, where its nodes are, and changes to it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import NamedTuple

WIDTH = 120  # of a line


class Edit(NamedTuple):
    """Bytes `[start, stop)` of a source text, and what comes in their place."""

    start: int
    stop: int
    text: bytes


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

    def edited(self, edits: Iterable[Edit]) -> Text:
        """This text after edits that do not touch each other."""
        source = self.text
        for edit in sorted(edits, reverse=True):
            source = source[: edit.start] + edit.text + source[edit.stop :]
        return Text(source)


def until_done(text: Text, find: Callable[[Text], Iterable[Edit]]) -> Text:
    """A text after all edits that can be found in it; of those that touch, one has to wait."""
    while True:
        apart: list[Edit] = []
        for edit in sorted(find(text)):
            if not apart or edit.start >= apart[-1].stop:
                apart.append(edit)
        if not apart:
            return text
        text = text.edited(apart)
