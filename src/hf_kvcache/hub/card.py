"""The README of an exported repository."""

from __future__ import annotations


def card_of(model, cache, names: dict, family: str, command: str | None) -> str:
    """A model card."""
    return f"# {names['causal_lm']}\n"
