"""The files of a low-rank adapter: exactly what PEFT would write, read and written without PEFT.

    adapter_config.json            `peft_type` "KV_LOWRANK", ranks per layer, shapes, the base model's fingerprint
    adapter_model.safetensors      per layer and side: `<attention>.kv_lowrank.kv_lowrank_<side>_<down | up | mean>`

Nothing in these files is trusted: the config says which tensors there must be, of which shape, and the tensors are read
only after names and shapes have been compared.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.modules import CHILD
from hf_kvcache.codecs.basis import Basis

FORMAT_VERSION = 1
PEFT_TYPE = "KV_LOWRANK"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SIDES = ("k", "v")
DTYPES = ("F32", "BF16", "F16")
ROOT = "base_model.model."  # what PEFT puts before the name of every module
DEFAULT_PATH = "model.layers.{}.self_attn"  # of the attention modules of the decoders of transformers

_MAX_CONFIG = 16 << 20  # bytes
_NAME = re.compile(rf"base_model\.model\.((?:\w+\.)+){CHILD}\.{CHILD}_([kv])_(down|up|mean)", re.ASCII)
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def shapes(config: dict, side: str, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of one side of one layer, by part."""
    s, head_dim = config[f"group_size_{side}"], config["head_dim"]
    n_groups = config["n_kv_heads"] // s
    found = {"down": (n_groups, s * head_dim, rank), "up": (n_groups, s, rank, head_dim)}
    return found | ({"mean": (n_groups, s * head_dim)} if config[f"has_mean_{side}"] else {})


def check_config(config: dict, where: str) -> None:
    """Raise `AdapterError` unless a config says what an adapter must say, and nothing impossible."""

    def refuse(name):
        raise AdapterError(f"{where}: {name}={config.get(name)!r} is damaged or missing")

    for name in ("n_kv_heads", "head_dim", "group_size_k", "group_size_v"):
        if not _is_count(config.get(name)):
            refuse(name)
    if config.get("rope") not in ("pre", "post"):
        refuse("rope")
    for side in SIDES:
        if not isinstance(config.get(f"has_mean_{side}"), bool):
            refuse(f"has_mean_{side}")
        group_size = config[f"group_size_{side}"]
        if config["n_kv_heads"] % group_size:
            refuse(f"group_size_{side}")
        ranks, width = config.get(f"ranks_{side}"), group_size * config["head_dim"]
        if not isinstance(ranks, list) or not all(r is None or (_is_count(r) and r <= width) for r in ranks):
            refuse(f"ranks_{side}")
    if len(config["ranks_k"]) != len(config["ranks_v"]):
        raise AdapterError(f"{where}: ranks_k and ranks_v are of different numbers of layers")
    for name in ("budget", "fingerprint", "cache_kwargs"):
        if not isinstance(config.get(name), dict | None):
            refuse(name)
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        refuse("base_model_name_or_path")
    cache_class = config.get("cache_class")
    if cache_class is not None and not (isinstance(cache_class, str) and _IDENTIFIER.fullmatch(cache_class)):
        refuse("cache_class")


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def write(directory: str | os.PathLike, config: dict, bases: dict[int, dict[str, Basis]], paths: dict) -> Path:
    """Write both files; an earlier adapter there is replaced, and no reader finds a mixture of the two.

    Args:
        directory: created if need be.
        config: what `adapter_config.json` shall hold.
        bases: by layer and side.
        paths: names of the attention modules by layer.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{ROOT}{paths[layer_idx]}.{CHILD}.{CHILD}_{side}_{part}": t.detach().to("cpu").contiguous()
        for layer_idx, sides in bases.items()
        for side, basis in sides.items()
        for part, t in basis.tensors.items()
    }
    for name, t in tensors.items():
        if not t.isfinite().all():
            raise AdapterError(f"{name} holds NaN or infinity; this adapter would be refused when it is loaded")
    weights, text = _temporary(directory), _temporary(directory)
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
        text.write_text(json.dumps(config, indent=2, sort_keys=True))
        for file in (weights, text):
            file.chmod(0o666 & ~_umask())
        # without its config an adapter is none: readers meet the old one, none, or the new one
        (directory / CONFIG).unlink(missing_ok=True)
        os.replace(weights, directory / TENSORS)
        os.replace(text, directory / CONFIG)
    finally:
        weights.unlink(missing_ok=True)
        text.unlink(missing_ok=True)
    return directory


def _temporary(directory: Path) -> Path:
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".saving-", delete=False) as unfinished:
        return Path(unfinished.name)


def _umask() -> int:
    # temporary files are private, an adapter is as readable as other files; there is no way to ask but to set
    umask = os.umask(0)
    os.umask(umask)
    return umask


def read(source: str | os.PathLike, **hub) -> tuple[dict, dict[int, dict[str, Basis]]]:
    """The config and the bases, by layer and side, of an adapter in a folder or on the Hub.

    Args:
        source: folder, or Hub repository ("name/repo").
        hub: arguments of `huggingface_hub.hf_hub_download` (`revision`, `token`, `subfolder`, ...).

    Raises:
        AdapterError: files are missing, damaged or of another format, or say something impossible.
    """
    config_path, tensors_path = _files(source, hub)
    config = _read_config(config_path)
    return config, _read_tensors(tensors_path, config)


def _files(source, hub) -> tuple[Path, Path]:
    folder = Path(source) / (hub.get("subfolder") or "")
    if folder.is_dir():
        for name in (CONFIG, TENSORS):
            if not (folder / name).is_file():
                pickled = " (a pickled adapter_model.bin is never read)" if name == TENSORS else ""
                raise AdapterError(f"{folder} holds no adapter: {name} is missing{pickled}")
        return folder / CONFIG, folder / TENSORS
    if not _HUB_ID.fullmatch(str(source)) or ".." in str(source):
        raise AdapterError(f"{source} is neither a folder nor the name of a repository on the Hub")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return tuple(Path(hf_hub_download(str(source), name, **hub)) for name in (CONFIG, TENSORS))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise AdapterError(f"{source} is no folder, and no adapter on the Hub that can be reached: {error}") from error


def _read_config(path: Path) -> dict:
    if path.stat().st_size > _MAX_CONFIG:
        raise AdapterError(f"{path} is larger than any adapter's config")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != PEFT_TYPE:
        raise AdapterError(f"{path} is of peft_type {kind!r}, a low-rank KV adapter is {PEFT_TYPE!r}")
    if config.get("format_version") != FORMAT_VERSION:
        raise AdapterError(
            f"{path} has format_version {config.get('format_version')!r}, this release reads {FORMAT_VERSION}"
        )
    check_config(config, str(path))
    return config


def _read_tensors(path: Path, config: dict) -> dict[int, dict[str, Basis]]:
    due = {
        (layer_idx, side, part): shape
        for side in SIDES
        for layer_idx, rank in enumerate(config[f"ranks_{side}"])
        if rank is not None
        for part, shape in shapes(config, side, rank).items()
    }
    try:
        with safe_open(path, "pt") as file:
            names = _places(file.keys(), path)
            for missing in due.keys() - names.keys():
                raise AdapterError(f"{path}: the {_spoken(missing)} is missing")
            for extra in names.keys() - due.keys():
                raise AdapterError(f"{path}: {names[extra]} is not among the tensors that {CONFIG} speaks of")
            for place, name in names.items():
                part = file.get_slice(name)
                if tuple(part.get_shape()) != due[place] or part.get_dtype() not in DTYPES:
                    raise AdapterError(
                        f"{path}: the {_spoken(place)} is {part.get_dtype()} of shape {tuple(part.get_shape())}, "
                        f"{CONFIG} says {due[place]}"
                    )
            tensors = {place: file.get_tensor(name) for place, name in names.items()}
    except SafetensorError as error:
        raise AdapterError(f"{path} is no safetensors file, or a damaged one: {error}") from error
    for place, t in tensors.items():
        if not t.isfinite().all():
            raise AdapterError(f"{path}: the {_spoken(place)} holds NaN or infinity")
    return assemble(tensors)


def assemble(tensors: dict[tuple[int, str, str], torch.Tensor]) -> dict[int, dict[str, Basis]]:
    """Bases by layer and side, from tensors by layer, side and part."""
    parts: dict[int, dict[str, dict]] = {}
    for (layer_idx, side, part), t in sorted(tensors.items(), key=lambda item: item[0]):
        parts.setdefault(layer_idx, {}).setdefault(side, {})[part] = t
    return {i: {side: Basis(**own) for side, own in sides.items()} for i, sides in parts.items()}


def _places(names, path) -> dict[tuple[int, str, str], str]:
    """Layer, side and part of every tensor; the layer is the last number in the path of its module."""
    places, paths = {}, set()
    for name in names:
        match = _NAME.fullmatch(name)
        numbers = [] if match is None else list(_NUMBER.finditer(match[1]))
        if not numbers or len(numbers[-1][0]) > 6:
            raise AdapterError(f"{path}: {name!r} is no name that an adapter would write")
        last = numbers[-1]
        paths.add(match[1][: last.start()] + match[1][last.end() :])
        place = int(last[0]), match[2], match[3]
        if place in places:
            raise AdapterError(f"{path}: {name!r} and {places[place]!r} are of the same layer")
        places[place] = name
    if len(paths) > 1:
        raise AdapterError(f"{path}: the tensors belong to different models: {', '.join(sorted(paths))}")
    return places


def _spoken(place) -> str:
    layer_idx, side, part = place
    return f"{part} tensor of the {'keys' if side == 'k' else 'values'} of layer {layer_idx}"
