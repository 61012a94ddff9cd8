"""Packages that a script shall not find."""

import sys


class Hiding:
    """A finder that does not find some packages."""

    def __init__(self, finder, hidden):
        self.finder, self.hidden = finder, hidden

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.hidden else self.finder.find_spec(name, path, target)


def hide(*packages: str) -> None:
    """Let nothing be imported from these packages from now on."""
    sys.meta_path[:] = [Hiding(finder, packages) for finder in sys.meta_path]
