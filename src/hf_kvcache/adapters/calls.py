"""The calls of a module that are under way: what hooks of one call tell each other stays in that call."""

from __future__ import annotations

import threading


class Calls(threading.local):
    """Every thread's own stack of calls of one module, so that threads that share a model cannot mix them up.

    A call within a call lies on top of it. Copies of a module begin with none, and none is pickled.

    Attributes:
        newest: for the owner to say which call somebody may still ask about; None at first.
        n_off: for the owner to count blocks of code in which calls of this thread are different.
    """

    def __init__(self):
        self.newest, self.n_off = None, 0
        self._stack: list = []

    @property
    def now(self):
        """What `begin` was given for the innermost call of this thread; None outside a call."""
        return self._stack[-1] if self._stack else None

    def begin(self, call) -> None:
        """A call begins; None is one that nobody looks at."""
        self._stack.append(call)

    def end(self):
        """It is over; returns what it began with."""
        # an exception before anybody could `begin` ends here, too
        return self._stack.pop() if self._stack else None

    def __reduce__(self):
        return type(self), ()
