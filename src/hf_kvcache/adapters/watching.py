"""Hooks on a module's projections that follow them when PEFT wraps or unwraps one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
from torch import nn

# threads that share a model would hook a projection twice
_HOOKING = threading.Lock()


class Watch:
    """Forward hooks by role ("q", "k", "v" or "qkv"), each on one module."""

    def __init__(self):
        self.handles: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self._ids: dict[str, int] = {}

    @property
    def roles(self):
        """That have a hook."""
        return self._ids.keys()

    def follow(self, modules: Mapping[str, nn.Module], hooks: Mapping[str, Callable]) -> None:
        """Have these hooks on these modules, by role, and on no others.

        What is right already stays untouched, so that calls of the model in other threads go on undisturbed.
        """
        if self._are_on(modules):
            return
        with _HOOKING:
            if self._are_on(modules):
                return
            for role in [*self.roles]:
                if role not in modules or self._ids[role] not in modules[role]._forward_hooks:
                    self.handles.pop(role).remove()
                    del self._ids[role]
            for role, module in modules.items():
                if role not in self._ids:
                    self.handles[role] = module.register_forward_hook(hooks[role])
                    self._ids[role] = self.handles[role].id

    def release(self) -> None:
        """Take all hooks off."""
        for handle in self.handles.values():
            handle.remove()
        self.handles, self._ids = {}, {}

    def _are_on(self, modules) -> bool:
        # ids rather than handles, which torch.compile cannot look into
        return len(modules) == len(self._ids) and all(
            self._ids.get(role) in module._forward_hooks for role, module in modules.items()
        )
