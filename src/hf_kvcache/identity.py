"""Whose tokens a cache holds: the model is told by one of its attention modules."""

from __future__ import annotations

import weakref

import torch

from hf_kvcache import compat
from hf_kvcache.warn import warn_once


class CacheFileError(ValueError):
    """Raised when saved files are truncated, altered, of another format, or of another model."""


class Identity:
    """Mixed into a cache: which model it has met, and which one a loaded cache expects."""

    _model: weakref.ref | None = None
    _expected: dict | None = None

    @property
    def fingerprint(self) -> dict | None:
        """What identifies the model whose tokens these are; None before the first use or when the model is gone."""
        module = self._model() if self._model is not None else None
        return self._expected if module is None else self._fingerprint(module)

    def _fingerprint(self, module: torch.nn.Module) -> dict:
        from hf_kvcache.fingerprint import fingerprint, whose

        return fingerprint(module) | whose(self.layers[self.first_layer], module)

    def expect(self, model: dict | None) -> None:
        """Refuse models with another fingerprint from now on."""
        self._expected = model

    def rebind(self) -> None:
        """Let another module with the same weights (a copy, a compiled model) go on with this cache."""
        self._model = self._expected = None

    def check_model(self, module: torch.nn.Module, what: str) -> None:
        """Raise `CacheFileError` unless `module` is of the model that `what` was made with."""
        found = self._fingerprint(module)
        if self._expected is not None and found != self._expected:
            either = found | self._expected
            differing = ", ".join(key for key in either if found.get(key) != self._expected.get(key))
            raise CacheFileError(f"{what} was made with another model (differs in: {differing})")
        self._expected = None

    def _recognise(self, module: torch.nn.Module, is_prefill: bool) -> None:
        """The first layer that is ours meets its attention module.

        Raises:
            ValueError: the cache holds tokens of another model.
        """
        known = self._model() if self._model is not None else None
        if known is not None and known is not module and not is_prefill:
            raise ValueError(
                "this cache holds tokens of another model; use a new cache, reset() this one, or say rebind() "
                "if the two models really share their weights"
            )
        if self._expected is not None:
            self.check_model(module, "the loaded cache")
        if self._model is None:
            _warn_of_length(module)
        self._model = weakref.ref(module)


def _warn_of_length(module: torch.nn.Module) -> None:
    length = compat.leaves_cache_at(module)
    if length is not None:
        warn_once(
            f"generate() of this model switches its longrope factors after {length} tokens: transformers "
            f"then drops the cache that it was given and goes on in a dense one of its own. Texts of up to {length} "
            "tokens, and forward passes outside of generate(), stay in this cache"
        )
