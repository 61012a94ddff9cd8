"""What this library makes known to another one, once that one is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from threading import get_ident


def when_imported(package: str, act: Callable[[], object]) -> None:
    """Call `act` right after `package` has been imported; at once where it has been.

    Args:
        package: a package or a module. It is imported as it would be without us, and need not be installed.
        act: called once, within the import, so that whoever imports the package finds `act` done. What it raises ends
            the import.
    """
    if package in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _Finder(package, act))


class _Finder(MetaPathFinder):
    """Lets the other finders find one package, and has its loader followed by a call."""

    def __init__(self, package: str, act: Callable[[], object]):
        self.package, self.act = package, act
        # threads that ask the other finders, one of which may be wrapped around this one
        self.asking: set[int] = set()
        self.is_done = False

    def find_spec(self, name, path=None, target=None):
        if name != self.package or self.is_done or get_ident() in self.asking:
            return None
        self.asking.add(get_ident())
        try:
            others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
            spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        finally:
            self.asking.remove(get_ident())
        if spec is not None and spec.loader is not None:
            spec.loader = _Followed(spec.loader, self)
        return spec

    def follow(self) -> None:
        if not self.is_done:
            self.act()
            self.is_done = True
            if self in sys.meta_path:
                sys.meta_path.remove(self)


class _Followed(Loader):
    """A loader that is put back as soon as it is used; until then it answers as the other does."""

    def __init__(self, loader, finder: _Finder):
        self._loader, self._finder = loader, finder

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._finder.follow()
