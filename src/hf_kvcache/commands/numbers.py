"""Numbers as they are typed: what argparse refuses before anything is loaded."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError


def positive(text: str) -> int:
    """A whole number from 1 up."""
    return _whole(text, 1, "a positive number")


def count(text: str) -> int:
    """A whole number from 0 up."""
    return _whole(text, 0, "a number from 0 up")


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    value = _finite(text)
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"{text} is not a share, above 0 and up to 1")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1, both included."""
    value = _finite(text)
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"{text} is not a share, from 0 to 1")
    return value


def points(text: str) -> float:
    """A number above 0 and up to 100."""
    value = _finite(text)
    if not 0 < value <= 100:
        raise ArgumentTypeError(f"{text} is not a number of points, above 0 and up to 100")
    return value


def weight(text: str) -> float:
    """A finite number from 0 up."""
    value = _finite(text)
    if value < 0:
        raise ArgumentTypeError(f"{text} is not a number from 0 up")
    return value


def temperature(text: str) -> float:
    """A finite number from 0 up."""
    value = _finite(text)
    if value < 0:
        raise ArgumentTypeError(f"{text} is not a temperature: use 0 for greedy decoding, or a number above it")
    return value


def heads(text: str) -> int | str:
    """How many heads share something: a whole number from 1 up, or `all`."""
    return text if text == "all" else _whole(text, 1, "a positive number, or all")


def _whole(text: str, least: int, what: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise ArgumentTypeError(f"{text} is not {what}")
    return value


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"{text} is not a finite number")
    return value
