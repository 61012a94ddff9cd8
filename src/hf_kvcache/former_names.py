"""Names that were other words in release 0.1: they still work, say so once, and go with release 0.3."""

from __future__ import annotations

import functools
from collections.abc import Callable

from hf_kvcache.warn import warn_once

# what policies of users may define
POLICY = {
    "note": "on_forward",
    "observe": "on_queries",
    "observes": "wants_queries",
    "worth": "masked_scores",
    "is_due": "should_evict",
    "fold": "merge_evicted",
    "folds": "merges_evicted",
    "waits": "defer_prefill_eviction",
}


def say_renamed(what: str, now: str) -> None:
    """Warn once that something has another name now."""
    warn_once(f"{what} is called {now} now; the old name goes with release 0.3")


def take_over(kind: type, names: dict[str, str]) -> None:
    """Let what a class defines under former names stand under those of today, unless it defines these, too."""
    for former in names.keys() & vars(kind).keys():
        if names[former] not in vars(kind):
            say_renamed(f"{kind.__name__}.{former}", names[former])
            setattr(kind, names[former], vars(kind)[former])


class Former:
    """A class attribute: what reads or sets it gets at the attribute that has its value today."""

    def __init__(self, now: str):
        self.now = now

    def __set_name__(self, owner: type, name: str):
        self.name = name

    def __get__(self, instance, owner: type):
        say_renamed(f"{owner.__name__}.{self.name}", self.now)
        # a class that defines the former name gets here by super() only
        heirs = [kind for kind in owner.__mro__ if vars(kind).get(self.name, self) is not self]
        this = owner if instance is None else instance
        return getattr(super(heirs[-1], this) if heirs else this, self.now)

    def __set__(self, instance, value):
        say_renamed(f"{type(instance).__name__}.{self.name}", self.now)
        setattr(instance, self.now, value)


def argument(name: str, now: str) -> Callable:
    """Decorate a function whose argument `now` may also be given as `name`; both at once raise TypeError."""

    def decorate(function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            if name in kwargs:
                if now in kwargs:
                    raise TypeError(f"{name}= and {now}= are one argument: give {now}= alone")
                say_renamed(f"{name}=", f"{now}=")
                kwargs[now] = kwargs.pop(name)
            return function(*args, **kwargs)

        return wrapped

    return decorate


def former(package: str, names: dict[str, str], found: dict) -> Callable[[str], object]:
    """The `__getattr__` of a module.

    Args:
        package: its name.
        names: what things of it were called, and are called now.
        found: its `globals()`.
    """

    def find(name: str):
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        say_renamed(f"{package}.{name}", names[name])
        return found[names[name]]

    return find
