"""Adapters that attend in place of an attention module, where no cache of theirs does."""

from __future__ import annotations

import torch


class Guest:
    """Mixed into an adapter that hangs on an attention module and decides what its attention sees."""

    is_active: bool

    def attend_tensors(self, module, query, key, value, mask, base, fuses, options):
        """Attention over tensors, with the arguments of `AttentionCall`: the output `[B, S, Hq, D]`, and weights."""
        raise NotImplementedError


def guest_of(module: torch.nn.Module) -> Guest | None:
    """The active one of a module, or None."""
    return next((child for child in module.children() if isinstance(child, Guest) and child.is_active), None)
