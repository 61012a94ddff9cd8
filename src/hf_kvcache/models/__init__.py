"""The embedded small model (its card: `small/README.md`), the prose it is tried on, and models known by name."""

from pathlib import Path

from hf_kvcache.models.known import path_of, resolve

__all__ = ["embedded_heads", "embedded_model", "embedded_prose", "path_of", "resolve"]


def embedded_model() -> Path:
    """Local folder of the embedded model, for `from_pretrained`."""
    return Path(__file__).parent / "small"


def embedded_heads() -> Path:
    """Local folder of retaining heads for the embedded model: `adapters.attach(model, embedded_heads())`."""
    return Path(__file__).parent / "small-heads"


def embedded_prose() -> Path:
    """Text file of English prose written for this project: default text of `compare`, filler of retrieval."""
    return Path(__file__).parent / "prose.txt"
