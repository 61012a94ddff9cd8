"""DMC and DMS: models that decide for themselves which tokens keep a row, trained and served."""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "Retrofit": "retrofitting",
    "Settings": "settings",
    "compression_off": "retrofitting",
    "decide": "decisions",
    "draw_noise": "retrofitting",
    "fold": "retrofitting",
    "load": "files",
    "merge": "merging",
    "retrofit": "retrofitting",
    "retrofits": "retrofitting",
    "save": "files",
    "zero_rows": "retrofitting",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
