"""A cache beside its copy: `copy.deepcopy`, which beams and forks of a conversation ask for."""

from __future__ import annotations

import copy


def twin(cache, memo: dict):
    """A copy within the process: of everything but the model and its constants, which both go on with."""
    other = type(cache).__new__(type(cache))
    memo[id(cache)] = other
    for name, value in vars(cache).items():
        # a stream is a place to work, not something held
        vars(other)[name] = value if name == "prefetch_stream" else copy.deepcopy(value, memo)
    # attention will be called with what the other cache has handed out
    other.handed = None
    return other
