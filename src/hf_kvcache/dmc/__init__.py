"""DMC and DMS: models that decide for themselves which tokens keep a row, trained and served."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

_HOME = {
    "Retrofit": "retrofit",
    "Settings": "settings",
    "compression_off": "retrofit",
    "decide": "decide",
    "draw_noise": "retrofit",
    "fold": "retrofit",
    "load": "files",
    "merge": "merge",
    "retrofit": "retrofit",
    "retrofits": "retrofit",
    "save": "files",
    "zero_rows": "retrofit",
}

__all__ = sorted(_HOME)


class _Package(ModuleType):
    """Some functions are called like their modules, which must not take their place when they are imported."""

    def __setattr__(self, name: str, value) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
