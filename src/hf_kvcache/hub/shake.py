"""Which definitions of the library an exported repository needs, by what refers to what."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Iterable, Iterator

from hf_kvcache.hub.fold import does_nothing
from hf_kvcache.hub.library import Module, where

OPS = "hf_kvcache.kernels"


class Shaken:
    """What can be reached from some definitions: `defined` (module, name), `members` (module, class, name).

    A member of a class is reached when its name is used anywhere on something, or when a base class that is not ours
    has it: a common name keeps more than is needed. What others call on mixins, and on layers of ours that their base
    class does not have, must be among the roots.

    Args:
        read: gives a `Module` by its name.
        roots: "module:name", or "module:Class.member".
        dropped: the same, of what is not to be followed.

    Attributes:
        modules: those that something is needed of.
        asked: (module, name) that the dispatcher asks a module for, which may have imported it only.
    """

    def __init__(self, read: Callable[[str], Module], roots: Iterable[str], dropped: Iterable[str] = ()):
        self._read, self._dropped = read, frozenset(dropped)
        self.modules: dict[str, Module] = {}
        self.defined: set[tuple[str, str]] = set()
        self.members: set[tuple[str, str, str]] = set()
        self.asked: set[tuple[str, str]] = set()
        self._names: set[str] = set()
        self._prefixes: tuple[str, ...] = ()
        self._classes: list[tuple[Module, ast.ClassDef]] = []
        self._work: list[tuple[Module, ast.AST]] = []
        for root in roots:
            module, _, path = root.partition(":")
            self.define(module, path.partition(".")[0])
            self._names.update(path.split(".")[1:])
        self._run()

    def idle(self) -> set[str]:
        """Names of reached methods that do nothing, wherever they are, and that nobody else asks for."""
        nothing, something = set(), set()
        for module, cls in self._classes:
            asked = _asked_of(module.name, cls.name)
            for statement in cls.body:
                name = getattr(statement, "name", None)
                if name is None or (module.name, cls.name, name) not in self.members:
                    continue
                is_idle = name not in asked and does_nothing(statement)
                (nothing if is_idle else something).add(name)
        return nothing - something

    # -- reaching ----------------------------------------------------------------------------------------------------

    def module(self, name: str) -> Module:
        if name not in self.modules:
            self.modules[name] = self._read(name)
            for statement in self.modules[name].text.tree.body:
                # what a module does when it is imported: registering, above all
                if isinstance(statement, (ast.Expr, ast.If, ast.For, ast.With, ast.Try)) and not _is_typing(statement):
                    self._work.append((self.modules[name], statement))
        return self.modules[name]

    def define(self, module: str, name: str) -> None:
        """A definition is needed; one that a module has imported is looked for where it comes from."""
        if f"{module}:{name}" in self._dropped or (module, name) in self.defined:
            return
        found = self.module(module)
        if name in found.units:
            self.defined.add((module, name))
            for statement in found.text.tree.body:
                if found.units[name] is statement or name in _targets(statement):
                    self._enter(found, statement)
        elif name in found.imports:
            self._import(found, name)

    def _enter(self, module: Module, statement: ast.stmt) -> None:
        if isinstance(statement, ast.ClassDef):
            self._classes.append((module, statement))
            for part in [*statement.bases, *statement.keywords, *statement.decorator_list]:
                self._work.append((module, part))
        else:
            self._work.append((module, statement))

    def _import(self, module: Module, bound: str) -> None:
        source, name = module.imports[bound]
        if where(source) is None:
            return
        if name is None:
            self.module(source)
        else:
            self.define(source, name)

    def _run(self) -> None:
        while True:
            while self._work:
                self._follow(*self._work.pop())
            for module, cls in list(self._classes):
                for statement in cls.body:
                    if self._is_reached(module, cls, statement):
                        self._work.append((module, statement))
            if not self._work:
                return

    def _is_reached(self, module: Module, cls: ast.ClassDef, statement: ast.stmt) -> bool:
        name = getattr(statement, "name", None) or f"line {statement.lineno}"
        key = module.name, cls.name, name
        if key in self.members or f"{module.name}:{cls.name}.{name}" in self._dropped:
            return False
        if isinstance(statement, ast.FunctionDef):
            is_dunder = name.startswith("__") and name.endswith("__")
            is_named = name in self._names or (self._prefixes and name.startswith(self._prefixes))
            if not (is_dunder or is_named or name in _asked_of(module.name, cls.name)):
                return False
        elif isinstance(statement, ast.Expr):
            return False
        self.members.add(key)
        return True

    def _follow(self, module: Module, node: ast.AST) -> None:
        """What a node uses."""
        for child in _evaluated(node):
            if isinstance(child, ast.Name):
                if child.id in module.units or child.id in module.imports:
                    self.define(module.name, child.id)
            elif isinstance(child, ast.Attribute):
                self._names.add(child.attr)
                of = child.value.id if isinstance(child.value, ast.Name) else None
                if of in module.imports and module.is_ours(of) and module.imports[of][1] is None:
                    self.define(module.imports[of][0], child.attr)
            elif isinstance(child, ast.Constant) and isinstance(child.value, str) and child.value.isidentifier():
                self._names.add(child.value)
            elif isinstance(child, ast.JoinedStr) and isinstance(child.values[0], ast.Constant):
                # getattr(self, f"_on_{role}")
                if re.fullmatch(r"_\w+_", start := child.values[0].value):
                    self._prefixes = *self._prefixes, start
            elif isinstance(child, (ast.Import, ast.ImportFrom)):
                for bound in [alias.asname or alias.name for alias in child.names]:
                    self._import(module, bound)
            elif isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id == "select":
                self._select(child)

    def _select(self, call: ast.Call) -> None:
        """The dispatcher finds an op's backends by name."""
        if not (call.args and isinstance(call.args[0], ast.Constant)):
            return
        op = call.args[0].value
        for file, names in (("reference", [op]), ("triton_kernel", [op, "unavailable", "obstacle"])):
            for name in names:
                self.asked.add((f"{OPS}.{op}.{file}", name))
                self.define(f"{OPS}.{op}.{file}", name)


def _evaluated(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run, annotations being texts."""
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _evaluated(child)


def _targets(statement: ast.stmt) -> set[str]:
    target = getattr(statement, "target", None)
    return {target.id} if isinstance(statement, ast.AugAssign) and isinstance(target, ast.Name) else set()


def _is_typing(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.If) and isinstance(statement.test, ast.Name) and statement.test.id == "TYPE_CHECKING"
    )


def _asked_of(module: str, cls: str) -> frozenset[str]:
    """Members that a class has from elsewhere: transformers and torch will ask for them."""
    found = getattr(importlib.import_module(module), cls)
    foreign = [base for base in found.__mro__ if not base.__module__.startswith("hf_kvcache") and base is not object]
    return frozenset(name for base in foreign for name in vars(base))
