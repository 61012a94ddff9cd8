"""Values that came from a file, against what a dataclass declares."""

from __future__ import annotations

import reprlib
from dataclasses import MISSING, fields
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

LARGEST = 2**63  # integers stay below: those that tensors can hold


class Misfit(ValueError):
    """Raised when a value is not what its field declares; the message begins with the field."""


def shown(value) -> str:
    """A value for a message, shortened."""
    return reprlib.repr(value)


def build(kind: type, raw, where: str):
    """An instance of the dataclass `kind` of named values.

    Args:
        raw: an object of JSON.
        where: path of it, for messages.

    Raises:
        Misfit: it is no object, a value is missing, unknown or of another type, or `kind` refuses it.
    """
    values = arguments(kind, raw, where)
    try:
        return kind(**values)
    except Misfit:
        raise
    except Exception as error:
        # settings that never were may break a constructor anywhere
        raise Misfit(f"{where}: {str(error)[:300]}") from error


def arguments(kind: type, raw, where: str) -> dict:
    """Named values that `kind`, a dataclass, can be made of, checked one by one; see `build`.

    A field whose name in the file is no name in Python says so by `metadata={"key": ...}`.
    """
    if not isinstance(raw, dict):
        raise Misfit(f"{where}: {shown(raw)} is no object")
    declared = {field.metadata.get("key", field.name): field for field in fields(kind) if field.init}
    hints = _hints(kind)
    for key, value in raw.items():
        if key not in declared:
            raise Misfit(f"{where}.{shown(key)[1:-1]}: {kind.__name__} has no such field")
        hint = hints.get(declared[key].name, Any)
        if not fits(value, hint):
            raise Misfit(f"{where}.{key}: {shown(value)} is not {_named(hint)}")
    for key, field in declared.items():
        if key not in raw and field.default is MISSING and field.default_factory is MISSING:
            raise Misfit(f"{where}.{key} is missing")
    return {declared[key].name: value for key, value in raw.items()}


def fits(value, hint) -> bool:
    """Whether a value is of a declared type; what is not known to JSON is only asked for its class."""
    if hint in (Any, object):
        return True
    if hint in (None, NoneType):
        return value is None
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in get_args(hint))
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return _is_int(value)
    if hint is float:
        return _is_int(value) or (isinstance(value, float) and value == value)
    if origin is list or hint is list:
        return isinstance(value, list) and all(fits(item, one) for one in get_args(hint) for item in value)
    if origin is dict or hint is dict:
        of_keys, of_values = get_args(hint) or (Any, Any)
        return isinstance(value, dict) and all(fits(k, of_keys) and fits(v, of_values) for k, v in value.items())
    return isinstance(value, hint) if isinstance(hint, type) else True


def kind_of(spec, key: str, base: type, where: str) -> type:
    """The class derived from `base` that an object of JSON names under `key`.

    Raises:
        Misfit: it is no object, or names no class or several.
    """
    if not isinstance(spec, dict):
        raise Misfit(f"{where}: {shown(spec)} is no object")
    return class_named(spec.get(key), base, f"{where}.{key}", key)


def class_named(name, base: type, where: str, what: str) -> type:
    """The class called `name`, `base` or one derived from it.

    A class that was defined again, as notebooks do, is the newest of that name in its module.

    Raises:
        Misfit: there is none, or there are some in several modules.
    """
    found = {kind.__module__: kind for kind in _derived(base) if kind.__name__ == name}
    if not found:
        raise Misfit(f"{where}: no {what} is called {shown(name)}; if it is a class of your own, import it first")
    if len(found) > 1:
        raise Misfit(f"{where}: {' and '.join(sorted(found))} both have a {what} called {name}")
    return next(iter(found.values()))


def refuse_depth(raw, most: int) -> None:
    """Raise `Misfit` where lists and objects nest more than `most` deep, which no walk over them would survive."""
    level = [("", raw)]
    for _ in range(most):
        level = [
            (f"{where}.{name}" if where else str(name), item)
            for where, value in level
            for name, item in _items(value)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise Misfit(f"{level[0][0][:80]}: nested more than {most} deep")


def _items(value):
    return value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _derived(base: type) -> list[type]:
    """`base` and all classes derived from it, each once, in the order in which they were made."""
    found = {base: None}
    for kind in base.__subclasses__():
        found |= dict.fromkeys(_derived(kind))
    return list(found)


def _named(hint) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


@lru_cache(maxsize=256)
def _hints(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except NameError:
        # a class whose types can only be seen where it was written
        return {}
