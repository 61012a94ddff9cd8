"""The one error of adapters."""

from __future__ import annotations


class AdapterError(ValueError):
    """Raised when an adapter's files are damaged, hostile or of another format, or when it does not fit a model."""
