"""DMC and DMS: models that decide for themselves which tokens keep a row, trained and served."""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "Retrofit": "retrofit",
    "Settings": "settings",
    "compression_off": "retrofit",
    "decide": "decide",
    "draw_noise": "retrofit",
    "fold": "retrofit",
    "merge": "merge",
    "retrofit": "retrofit",
    "retrofits": "retrofit",
    "zero_rows": "retrofit",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
