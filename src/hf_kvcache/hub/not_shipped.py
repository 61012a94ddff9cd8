"""What a repository does without: its files import it from here, and whoever calls for it is told."""

from __future__ import annotations


def __getattr__(name: str):
    # the interpreter itself asks for such names
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(f"{name} is a part of hf_kvcache that this repository does without: pip install hf_kvcache")
