"""Which definitions of the library an exported repository needs, by what refers to what."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Iterable, Iterator

from hf_kvcache.hub.library import Module, where
from hf_kvcache.hub.members import Members, foreign, is_mentioned, receiver
from hf_kvcache.hub.values import name_of

OPS = "hf_kvcache.kernels"
# functions that look at classes, and the place of these among the arguments
_ASKS = {"isinstance": 1, "issubclass": 1, "_subclasses": 0}


class Shaken:
    """What can be reached from some definitions: `defined` (module, name), `members` (module, class, name).

    A member is reached when its name is used on something (see `Members`): a common name keeps more than is needed.
    What others call on mixins, and on layers of ours that their base class does not have, must be among the roots.

    Args:
        read: gives a `Module` by its name.
        roots: "module:name", or "module:Class.member", which does not say that there are instances of that very class.
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
        self._used = Members()
        self._classes: list[tuple[Module, ast.ClassDef]] = []
        self._work: list[tuple[Module, ast.AST]] = []
        for root in roots:
            module, _, path = root.partition(":")
            self.define(module, path.partition(".")[0], is_made="." not in path)
            self._used.names.update(path.split(".")[1:])
        self._run()

    def functions(self) -> dict[str, ast.FunctionDef]:
        """Those of all modules, and the methods of classes that are needed, as "module:name" or "module:Class.name"."""
        found = {}
        for name, module in self.modules.items():
            found |= {f"{name}:{s.name}": s for s in module.text.tree.body if isinstance(s, ast.FunctionDef)}
        for module, cls in self._classes:
            of = f"{module.name}:{cls.name}"
            found |= {f"{of}.{s.name}": s for s in cls.body if isinstance(s, ast.FunctionDef)}
        return found

    # -- reaching ----------------------------------------------------------------------------------------------------

    def module(self, name: str) -> Module:
        if name not in self.modules:
            self.modules[name] = self._read(name)
            for statement in self.modules[name].text.tree.body:
                # what a module does when it is imported: registering, above all
                if isinstance(statement, (ast.Expr, ast.If, ast.For, ast.With, ast.Try)) and not _is_typing(statement):
                    self._work.append((self.modules[name], statement))
        return self.modules[name]

    def define(self, module: str, name: str, is_made: bool = False) -> None:
        """A definition is needed; one that a module has imported is looked for where it comes from.

        `is_made` says of a class that it may have instances of its own.
        """
        if f"{module}:{name}" in self._dropped:
            return
        found = self.module(module)
        if name in found.units:
            if is_made and isinstance(found.units[name], ast.ClassDef):
                self._used.made.add(_runtime(module, name))
            if (module, name) in self.defined:
                return
            self.defined.add((module, name))
            for statement in found.text.tree.body:
                if found.units[name] is statement or name in _targets(statement):
                    self._enter(found, statement)
        elif name in found.imports:
            self._import(found, name, is_made)

    def _enter(self, module: Module, statement: ast.stmt) -> None:
        if isinstance(statement, ast.ClassDef):
            self._classes.append((module, statement))
            for base in statement.bases:
                for name in ast.walk(base):
                    if isinstance(name, ast.Name):
                        self.define(module.name, name.id)
            for part in [*statement.keywords, *statement.decorator_list]:
                self._work.append((module, part))
        else:
            self._work.append((module, statement))

    def _import(self, module: Module, bound: str, is_made: bool = False) -> None:
        source, name = module.imports[bound]
        if where(source) is None:
            return
        if name is None:
            self.module(source)
        else:
            self.define(source, name, is_made)

    def _run(self) -> None:
        while True:
            while self._work:
                self._follow(*self._work.pop())
            for module, cls in list(self._classes):
                for statement in cls.body:
                    if self._is_reached(module, cls, statement):
                        self._used.enter(_runtime(module.name, cls.name), statement)
                        self._work.append((module, statement))
            if not self._work:
                return

    def _is_reached(self, module: Module, cls: ast.ClassDef, statement: ast.stmt) -> bool:
        name = member_key(statement)
        key = module.name, cls.name, name
        if key in self.members or f"{module.name}:{cls.name}.{name}" in self._dropped:
            return False
        if isinstance(statement, ast.FunctionDef):
            kind = _runtime(module.name, cls.name)
            if not self._used.reach(kind, name):
                return False
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            kind = _runtime(module.name, cls.name)
            is_asked = any(self._used.reach(kind, n) or is_mentioned(n, foreign(kind)) for n in member_names(statement))
            if not (is_asked or _is_field(cls, statement)):
                return False
        elif isinstance(statement, ast.Expr):
            return False
        self.members.add(key)
        return True

    def _follow(self, module: Module, node: ast.AST) -> None:
        """What a node uses."""
        passive = _passive(node)
        for child in _evaluated(node):
            if isinstance(child, ast.Name):
                is_read = not isinstance(child.ctx, ast.Store)
                if is_read and (child.id in module.units or child.id in module.imports):
                    self.define(module.name, child.id, id(child) not in passive)
            elif isinstance(child, ast.Attribute):
                of = child.value.id if isinstance(child.value, ast.Name) else None
                is_module = of in module.imports and module.imports[of][1] is None
                if not is_module and id(child) not in passive and not isinstance(child.ctx, ast.Store):
                    self._used.names.add(child.attr)
                elif is_module and module.is_ours(of):
                    self.define(module.imports[of][0], child.attr, id(child) not in passive)
            elif isinstance(child, ast.Constant) and isinstance(child.value, str) and child.value.isidentifier():
                self._used.names.add(child.value)
            elif isinstance(child, ast.JoinedStr) and isinstance(child.values[0], ast.Constant):
                # getattr(self, f"_on_{role}")
                if re.fullmatch(r"_\w+_", start := child.values[0].value):
                    self._used.prefixes = *self._used.prefixes, start
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
        name = next((k.value.value for k in call.keywords if k.arg == "name"), op)
        for file, names in (("reference", [name]), ("triton_kernel", [name, "unavailable", "obstacle"])):
            for name in names:
                self.asked.add((f"{OPS}.{op}.{file}", name))
                self.define(f"{OPS}.{op}.{file}", name)


def member_names(statement: ast.stmt) -> list[str]:
    """What a statement in the body of a class defines: a method, or attributes."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", statement)]
    names = [getattr(target, "id", getattr(target, "name", None)) for target in targets]
    return [name for name in names if name is not None]


def member_key(statement: ast.stmt) -> str:
    """What tells it apart from others of its class."""
    return ".".join(member_names(statement)) or f"line {statement.lineno}"


def _is_field(cls: ast.ClassDef, statement: ast.stmt) -> bool:
    """Whether it is a field of instances, as classes of data have them."""
    is_data = any(name_of(getattr(d, "func", d)) == "dataclass" for d in cls.decorator_list)
    is_data |= any(name_of(base) == "NamedTuple" for base in cls.bases)
    return is_data and isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation)


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


def _passive(node: ast.AST) -> set[int]:
    """Nodes that name a class or a member without making or calling it, by id.

    That is what `isinstance` and `__subclasses__` are asked about, and attributes of `self` and `super()`, which
    `Members` looks at.
    """
    found = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id in _ASKS:
            found |= {id(inner) for inner in ast.walk(child.args[_ASKS[child.func.id]])}
        elif isinstance(child, ast.Attribute) and child.attr == "__subclasses__":
            found.add(id(child.value))
        elif isinstance(child, ast.Attribute) and receiver(child) is not None:
            found.add(id(child))
    return found


def _runtime(module: str, cls: str) -> type:
    return getattr(importlib.import_module(module), cls)
