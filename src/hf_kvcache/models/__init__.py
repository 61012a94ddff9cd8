"""The embedded small model and the prose it is tried on; see `small/README.md` for the model's card."""

from pathlib import Path


def embedded_model() -> Path:
    """Local folder of the embedded model, for `from_pretrained`."""
    return Path(__file__).parent / "small"


def embedded_heads() -> Path:
    """Local folder of retaining heads for the embedded model: `adapters.attach(model, embedded_heads())`."""
    return Path(__file__).parent / "small-heads"


def embedded_prose() -> Path:
    """Text file of English prose written for this project: default text of `compare`, filler of retrieval."""
    return Path(__file__).parent / "prose.txt"
