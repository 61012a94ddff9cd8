"""Files of a repository that only one other file imports, as sections of that one."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection

from hf_kvcache.hub.flatten import WIDTH, block
from hf_kvcache.hub.library import defined, imported

LONGEST = 20_000  # bytes beyond which nothing is added to a file
_OWN_NAME = re.compile(r"(?<!\.)__name__")
_PLAIN = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


class _File:
    """A flat file in its parts: header and docstring, imports, and what it defines."""

    def __init__(self, name: str, source: str):
        self.name, self.source, tree = name, source, ast.parse(source)
        lines = source.splitlines(keepends=True)
        doc, *body = tree.body
        self.title = ast.get_docstring(tree).partition("\n")[0]
        imports = [s for s in body if isinstance(s, (ast.Import, ast.ImportFrom))]
        self.plain = [s for s in imports if getattr(s, "module", None) != "__future__"]
        self.definitions = body[len(imports) :]
        self.head = "".join(lines[: doc.end_lineno])
        first = self.definitions[0] if self.definitions else None
        self.body = "".join(lines[_first_line(lines, first) :]) if first is not None else ""
        self.bound = {name: of for s in self.plain for name, of in imported(s).items()}
        self.names = {name for s in self.definitions for name in defined(s)}
        # modules beside this one, by the names that each is asked for; None for the module itself
        self.of: dict[str, list[ast.ImportFrom]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                for module in [node.module] if node.module else [alias.name for alias in node.names]:
                    self.of.setdefault(module, []).append(node)

    @property
    def is_plain(self) -> bool:
        """Whether it does nothing but define, wherever it stands."""
        return all(isinstance(s, _PLAIN) for s in self.definitions) and not _OWN_NAME.search(self.source)


def join(files: dict[str, str], kept: Collection[str] = ()) -> dict[str, str]:
    """Files in which those that have one importer are part of it.

    Args:
        files: see `flatten`.
        kept: stems of those that are found by their names, beside those of ops.
    """
    parts = {name.removesuffix(".py"): source for name, source in files.items()}
    while (found := _next(parts, kept)) is not None:
        inner, outer = found
        parts[outer] = _joined(_File(outer, parts[outer]), _File(inner, parts.pop(inner)))
    return {f"{stem}.py": source for stem, source in parts.items()}


def _next(parts: dict[str, str], kept: Collection[str]) -> tuple[str, str] | None:
    """A file that can go, and the one that it goes to."""
    read = {stem: _File(stem, source) for stem, source in parts.items()}
    for stem, file in sorted(read.items()):
        users = [other for other in read.values() if stem in other.of]
        # backends of ops are found by their names
        is_kept = stem in kept or stem.startswith("kernels") and stem.endswith(("_reference", "_triton_kernel"))
        if is_kept or len(users) != 1 or not file.is_plain:
            continue
        user = users[0]
        if _fits(file, user) and len(file.source) + len(user.source) <= LONGEST:
            return stem, user.name
    return None


def _fits(file: _File, user: _File) -> bool:
    """Whether names mean the same in both, and the one asks for names of the other at its top alone."""
    asks = user.of[file.name]
    if user.name in file.of or any(node not in user.plain or not node.module for node in asks):
        return False
    if any(alias.asname for node in asks for alias in node.names):
        return False
    clashes = file.names & (user.names | user.bound.keys() - {a.name for node in asks for a in node.names})
    clashes |= user.names & file.bound.keys()
    return not clashes and all(user.bound.get(name, of) == of for name, of in file.bound.items())


def _joined(user: _File, file: _File) -> str:
    imports = [node for node in [*file.plain, *user.plain] if getattr(node, "module", None) != file.name]
    lines = "".join(ast.unparse(node) + "\n" for node in imports)
    heading = f"# hf_kvcache.{file.name}: {file.title}"[:WIDTH].rstrip()
    typing, rest = _split(user)
    sections = [typing, f"{heading}\n\n\n{file.body}", rest]
    text = "\n\n".join(section.strip("\n") + "\n" for section in sections if section)
    return f"{user.head}\nfrom __future__ import annotations\n{block(lines.splitlines(keepends=True))}\n{text}"


def _split(file: _File) -> tuple[str, str]:
    """What a file imports for its annotations, and its definitions."""
    first = file.definitions[0]
    if not isinstance(first, ast.If):
        return "", file.body
    lines = file.source.splitlines(keepends=True)
    typing = "".join(lines[first.lineno - 1 : first.end_lineno])
    return typing, "".join(lines[first.end_lineno :])


def _first_line(lines: list[str], statement: ast.stmt) -> int:
    """Index of the line that a statement begins on, decorators and comments included."""
    at = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", ()))]) - 1
    while lines[at - 1].startswith("#"):
        at -= 1
    return at
