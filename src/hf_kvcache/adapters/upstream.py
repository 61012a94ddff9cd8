"""The files of Locret's authors: state dicts of retaining heads, or of whole models with heads in them."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.retaining_files import PARTS

# what the authors evaluated every model with
DEFAULTS = {"stabilizers": 2500, "local": 100}

_NAME = re.compile(r"(?:.*\.)?layers\.(\d{1,6})\.self_attn\.(fc[12])\.(weight|bias)", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth")


def read(path: str | os.PathLike) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """`fc1` `[d_r, F]` and `fc2` `[Hkv, d_r]` by layer; see `RetainingHeads.from_upstream`.

    Raises:
        AdapterError: files are missing or damaged, hold more than tensors, or half of a layer's heads.
    """
    tensors: dict[tuple[int, str], torch.Tensor] = {}
    for file in _files(Path(path)):
        for name, t in _tensors(file).items():
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            if match[3] == "bias":
                raise AdapterError(f"{file}: {name} is a bias, which retaining heads have not")
            place = int(match[1]), match[2]
            if place in tensors:
                raise AdapterError(f"{file}: {name} has been read already")
            if not t.is_floating_point() or not t.isfinite().all():
                raise AdapterError(f"{file}: {name} is not floating point, or holds NaN or infinity")
            tensors[place] = t
    indices = sorted({i for i, _ in tensors})
    for i in indices or [0]:
        for part in PARTS:
            if (i, part) not in tensors:
                raise AdapterError(f"{path} has no model.layers.{i}.self_attn.{part}.weight")
    return {i: (tensors[i, "fc1"], tensors[i, "fc2"]) for i in indices}


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        for suffixes in (".safetensors",), (".bin",):
            found = sorted(file for file in path.iterdir() if file.suffix in suffixes and file.is_file())
            # what transformers' Trainer leaves behind is no dict of tensors
            if found := [file for file in found if file.name != "training_args.bin"]:
                return found
        raise AdapterError(f"{path} has neither .safetensors nor .bin files")
    if not path.is_file() or path.suffix not in (".safetensors", *_PICKLES):
        raise AdapterError(f"{path} is no folder, no .safetensors and no .bin file")
    return [path]


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file whose names contain "fc"."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys() if "fc" in name}
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    # what a damaged pickle raises is anything
    except Exception as error:
        raise AdapterError(f"{file} is damaged, or holds more than tensors: {error}") from error
    if not isinstance(found, Mapping):
        raise AdapterError(f"{file} holds a {type(found).__name__}, not tensors by name")
    # copies, so that the rest of the file need not stay open
    return {
        name: t.clone() for name, t in found.items() if isinstance(name, str) and "fc" in name and torch.is_tensor(t)
    }
