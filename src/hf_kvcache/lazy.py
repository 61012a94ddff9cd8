"""Names of a package that are imported when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module


def lazily(package: str, homes: dict[str, str], names: dict) -> Callable[[str], object]:
    """The `__getattr__` of a package.

    Args:
        package: its name.
        homes: the submodule of every name; a submodule is its own.
        names: its `globals()`, where what has been imported is kept.
    """

    def find(name: str):
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = import_module(f"{package}.{homes[name]}")
        names[name] = home if homes[name] == name else getattr(home, name)
        return names[name]

    return find
