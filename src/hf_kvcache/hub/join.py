"""Files of a repository that only one other file imports, as sections of that one."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection

from hf_kvcache.hub.flatten import FUTURE, block
from hf_kvcache.hub.library import defined, imported

LONGEST = 24_000  # bytes beyond which nothing is added to a file
_OWN_NAME = re.compile(r"(?<!\.)__name__")
_PLAIN = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


class _File:
    """A flat file in its parts: header and docstring, imports, and what it defines."""

    def __init__(self, name: str, source: str):
        self.name, self.source, tree = name, source, ast.parse(source)
        lines = source.splitlines(keepends=True)
        doc, *body = tree.body
        imports = [s for s in body if isinstance(s, (ast.Import, ast.ImportFrom))]
        self.plain = [s for s in imports if getattr(s, "module", None) != "__future__"]
        self.definitions = [s for s in body if s not in imports]
        self.head = "".join(lines[: doc.end_lineno])
        self.body = "".join(lines[max(s.end_lineno for s in [doc, *imports]) :]).strip("\n")
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
    parts = {name.removesuffix(".py"): _File(name.removesuffix(".py"), source) for name, source in files.items()}
    while (found := _next(parts, kept)) is not None:
        file, user = found
        parts[user.name] = _File(user.name, _joined(user, parts.pop(file.name)))
    return {f"{stem}.py": file.source for stem, file in parts.items()}


def _next(parts: dict[str, _File], kept: Collection[str]) -> tuple[_File, _File] | None:
    """A file that can go, and the one that it goes to."""
    for stem, file in sorted(parts.items()):
        users = [other for other in parts.values() if stem in other.of]
        # backends of ops are found by their names
        is_kept = stem in kept or stem.startswith("kernels") and stem.endswith(("_reference", "_triton_kernel"))
        if is_kept or len(users) != 1 or not file.is_plain:
            continue
        if _fits(file, users[0]) and len(file.source) + len(users[0].source) <= LONGEST:
            return file, users[0]
    return None


def _fits(file: _File, user: _File) -> bool:
    """Whether names mean the same in both, and the one asks for names of the other at its top alone."""
    asks = user.of[file.name]
    # Triton is imported where it may be missing, which stays as it is
    if any(isinstance(s, ast.Try) for s in user.definitions):
        return False
    if user.name in file.of or any(node not in user.plain or not node.module for node in asks):
        return False
    if any(alias.asname for node in asks for alias in node.names):
        return False
    clashes = file.names & (user.names | user.bound.keys() - {a.name for node in asks for a in node.names})
    clashes |= user.names & file.bound.keys()
    return not clashes and all(user.bound.get(name, of) == of for name, of in file.bound.items())


def _joined(user: _File, file: _File) -> str:
    imports = [node for node in [*file.plain, *user.plain] if getattr(node, "module", None) != file.name]
    lines = block([ast.unparse(node) + "\n" for node in imports])
    # the line that says which module it was
    heading = file.head.splitlines()[1].rpartition(" ")[0]
    future = FUTURE if FUTURE in user.source + file.source else ""
    top = f"{user.head}\n{future.rstrip()}\n" if future else user.head
    return f"{top}{lines}\n{heading}\n\n\n{file.body}\n\n\n{user.body}\n"
