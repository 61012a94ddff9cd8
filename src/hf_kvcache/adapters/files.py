"""The files of an adapter: exactly what PEFT would write, read and written without PEFT.

    adapter_config.json            `peft_type`, shapes, the base model's fingerprint
    adapter_model.safetensors      per layer: `<attention>.<child>.<child>_<part>`
    README.md                      how to load it; left alone if there is one

Nothing in them is trusted: `kinds` reads tensors only after names and shapes have been compared with the config's.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import save_file

from hf_kvcache.adapters import cards
from hf_kvcache.adapters.errors import AdapterError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"  # what PEFT would read in place of missing tensors
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
HUB = frozenset(inspect.signature(huggingface_hub.hf_hub_download).parameters)  # what may be said of a source
ROOT = "base_model.model."  # what PEFT puts before the name of every module
DEFAULT_PATH = "model.layers.{}.self_attn"  # of the attention modules of the decoders of transformers

_MAX_CONFIG = 16 << 20  # bytes
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)

Place = tuple[int, str]  # layer and part of a tensor


def written(peft_type: str) -> str:
    """What files call a kind. Where it is not known, all that PEFT and transformers say is a KeyError of this."""
    return f"{peft_type}: pip install hf_kvcache, then import hf_kvcache"


def write(directory: str | os.PathLike, config: dict, tensors: Mapping[str, torch.Tensor], card: cards.Card) -> Path:
    """`Kind.write` for tensors by name."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    for name, t in tensors.items():
        if t.dtype not in DTYPES:
            raise AdapterError(f"{name} is {t.dtype}; this adapter would be refused when it is loaded")
        if not t.isfinite().all():
            raise AdapterError(f"{name} holds NaN or infinity; this adapter would be refused when it is loaded")
    weights, text = _temporary(directory), _temporary(directory)
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
        text.write_text(json.dumps(config | {"peft_type": written(config["peft_type"])}, indent=2, sort_keys=True))
        for file in (weights, text):
            file.chmod(0o666 & ~_umask())
        # without its config an adapter is none: readers meet the old one, none, or the new one
        (directory / CONFIG).unlink(missing_ok=True)
        os.replace(weights, directory / TENSORS)
        os.replace(text, directory / CONFIG)
    finally:
        weights.unlink(missing_ok=True)
        text.unlink(missing_ok=True)
    cards.write(directory, config, card)
    return directory


def _temporary(directory: Path) -> Path:
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".saving-", delete=False) as unfinished:
        return Path(unfinished.name)


def _umask() -> int:
    # temporary files are private, an adapter is as readable as other files; there is no way to ask but to set
    umask = os.umask(0)
    os.umask(umask)
    return umask


def find(source: str | os.PathLike, names: tuple[str, ...], hub: Mapping) -> tuple[Path, ...]:
    """Where the files of an adapter are, in a folder or downloaded from the Hub.

    Raises:
        AdapterError: one is missing, or `source` is neither a folder nor the name of a repository.
        TypeError: `hub` has what `hf_hub_download` does not take.
    """
    if unknown := hub.keys() - HUB:
        raise TypeError(f"{', '.join(sorted(unknown))}: no such argument of an adapter, nor of hf_hub_download")
    folder = Path(source) / (hub.get("subfolder") or "")
    if folder.is_dir():
        for name in names:
            if not (folder / name).is_file():
                pickled = " (a pickled adapter_model.bin is never read)" if name == TENSORS else ""
                raise AdapterError(f"{folder} holds no adapter: {name} is missing{pickled}")
        return tuple(folder / name for name in names)
    if not _HUB_ID.fullmatch(str(source)) or ".." in str(source):
        raise AdapterError(f"{source} is neither a folder nor the name of a repository on the Hub")
    try:
        return tuple(Path(huggingface_hub.hf_hub_download(str(source), name, **hub)) for name in names)
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise AdapterError(f"{source} is no folder, and no adapter on the Hub that can be reached: {error}") from error


def read_config(path: Path) -> dict:
    """A config from a file, its `peft_type` without the advice of `written`; empty if that holds no JSON object.

    Raises:
        AdapterError: it is damaged or too large.
    """
    if path.stat().st_size > _MAX_CONFIG:
        raise AdapterError(f"{path} is larger than any adapter's config")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        return {}
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind == written(kind.partition(":")[0]):
        config["peft_type"] = kind.partition(":")[0]
    return config
