"""The files of an adapter: exactly what PEFT would write, read and written without PEFT.

    adapter_config.json            `peft_type`, shapes, the base model's fingerprint
    adapter_model.safetensors      per layer: `<attention>.<child>.<child>_<part>`
    README.md                      how to load it; left alone if there is one

Nothing in these files is trusted: the config says which tensors there must be, of which shape, and the tensors are read
only after names and shapes have been compared.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
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
_MAX_LAYERS = 1 << 14
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)

Place = tuple[int, str]  # layer and part of a tensor


@dataclass(frozen=True)
class Format:
    """One kind of adapter, as files.

    Attributes:
        peft_type: what the config calls it.
        title: what people call it, with its article.
        child: name of the module that carries it on an attention module.
        parts: of every layer, any of which may be missing.
        check: raises `AdapterError` unless a config says what it must; takes the config and where it is from.
        shapes: of the tensors that a config speaks of, by layer and part.
        spoken: a layer and part in words.
        version: of the format, in the config.
    """

    peft_type: str
    title: str
    child: str
    parts: tuple[str, ...]
    check: Callable[[Mapping, str], None]
    shapes: Callable[[Mapping], dict[Place, tuple[int, ...]]]
    spoken: Callable[[int, str], str]
    version: int = 1

    def name(self, path: str, part: str) -> str:
        """Of a tensor of the attention module at `path`."""
        return f"{ROOT}{path}.{self.child}.{self.child}_{part}"

    def write(self, directory: str | os.PathLike, config: dict, tensors: Mapping[Place, torch.Tensor], paths: Mapping):
        """Write the files; an earlier adapter there is replaced, and no reader finds a mixture of the two.

        Args:
            directory: created if need be.
            config: what `adapter_config.json` shall hold.
            tensors: by layer and part.
            paths: names of the attention modules by layer.

        Raises:
            AdapterError: a tensor holds NaN or infinity.
        """
        named = {self.name(paths[layer_idx], part): t for (layer_idx, part), t in tensors.items()}
        return write(directory, config, named)

    def read(self, source: str | os.PathLike, **hub) -> tuple[dict, dict[Place, torch.Tensor]]:
        """The config and the tensors, by layer and part, of an adapter in a folder or on the Hub.

        Args:
            source: folder, or Hub repository ("name/repo").
            hub: arguments of `huggingface_hub.hf_hub_download` (`revision`, `token`, `subfolder`, ...).

        Raises:
            AdapterError: files are missing, damaged or of another format, or say something impossible.
        """
        config, tensors_path = self._read_config(source, hub)
        return config, dict(self._each(tensors_path, self.shapes(config)))

    def verify(self, source: str | os.PathLike, **hub) -> None:
        """Raise what `read` would, with one tensor at a time in memory; arguments as there."""
        config, tensors_path = self._read_config(source, hub)
        for _ in self._each(tensors_path, self.shapes(config)):
            pass

    def verify_tensors(self, tensors: Mapping[str, torch.Tensor], config: Mapping, where: str) -> None:
        """Raise unless tensors that somebody else has read, by their names in files, are those of a config.

        Args:
            tensors: all that there are.
            config: complete.
            where: opens the message.

        Raises:
            AdapterError: as `read`.
        """
        found = {name: (tuple(t.shape), DTYPES.get(t.dtype, str(t.dtype))) for name, t in tensors.items()}
        for place, name in self._checked(found, self.shapes(config), where).items():
            self._check_values(place, tensors[name], where)

    def check_version(self, version, whose: str) -> None:
        """Raise `AdapterError` for a version that this release does not read; `whose` opens the message."""
        if version != self.version:
            raise AdapterError(f"{whose} format_version {version!r}, this release reads {self.version}")

    def _read_config(self, source, hub) -> tuple[dict, Path]:
        """The config, checked, and where the tensors are."""
        config_path, tensors_path = find(source, (CONFIG, TENSORS), hub)
        config = read_config(config_path)
        kind = config.get("peft_type")
        if kind != self.peft_type:
            raise AdapterError(f"{config_path} is of peft_type {kind!r}, {self.title} is {self.peft_type!r}")
        self.check_version(config.get("format_version"), f"{config_path} has")
        self.check(config, str(config_path))
        return config, tensors_path

    def _each(self, path: Path, due: dict[Place, tuple[int, ...]]) -> Iterator[tuple[Place, torch.Tensor]]:
        """The tensors of a file, each checked; none before all names and shapes are known to be right."""
        try:
            with safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}
                found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
                for place, name in self._checked(found, due, path).items():
                    tensor = file.get_tensor(name)
                    self._check_values(place, tensor, path)
                    yield place, tensor
        except SafetensorError as error:
            raise AdapterError(f"{path} is no safetensors file, or a damaged one: {error}") from error

    def _checked(self, found: Mapping[str, tuple[tuple[int, ...], str]], due: Mapping, path) -> dict[Place, str]:
        """Names by layer and part, out of shapes and dtypes by name."""
        names = self._places(found, path)
        for missing in sorted(due.keys() - names.keys()):
            raise AdapterError(f"{path}: the {self.spoken(*missing)} is missing")
        for extra in sorted(names.keys() - due.keys()):
            raise AdapterError(f"{path}: {names[extra]} is not among the tensors that {CONFIG} speaks of")
        for place, name in names.items():
            shape, dtype = found[name]
            if shape != due[place] or dtype not in DTYPES.values():
                raise AdapterError(
                    f"{path}: the {self.spoken(*place)} is {dtype} of shape {shape}, {CONFIG} says {due[place]}"
                )
        return names

    def _check_values(self, place: Place, tensor: torch.Tensor, path) -> None:
        if not tensor.isfinite().all():
            raise AdapterError(f"{path}: the {self.spoken(*place)} holds NaN or infinity")

    def _places(self, names, path) -> dict[Place, str]:
        """Layer and part of every tensor; the layer is the last number in the path of its module."""
        pattern = rf"{re.escape(ROOT)}((?:\w+\.)+){self.child}\.{self.child}_({'|'.join(self.parts)})"
        places, paths = {}, set()
        for name in names:
            match = re.fullmatch(pattern, name, re.ASCII)
            numbers = [] if match is None else list(_NUMBER.finditer(match[1]))
            if not numbers or len(numbers[-1][0]) > 6:
                raise AdapterError(f"{path}: {name!r} is no name that an adapter would write")
            last = numbers[-1]
            paths.add(match[1][: last.start()] + match[1][last.end() :])
            place = int(last[0]), match[2]
            if place in places:
                raise AdapterError(f"{path}: {name!r} and {places[place]!r} are of the same layer")
            places[place] = name
        if len(paths) > 1:
            raise AdapterError(f"{path}: the tensors belong to different models: {', '.join(sorted(paths))}")
        return places


def written(peft_type: str) -> str:
    """What files call a kind. Where it is not known, all that PEFT and transformers say is a KeyError of this."""
    return f"{peft_type}: pip install hf_kvcache, then import hf_kvcache"


def is_fingerprint(value) -> bool:
    """Whether a value from a config is None, or plain values by name, with as many layers as a model may have."""
    if value is None:
        return True
    if not isinstance(value, dict) or not all(isinstance(own, str | int | float | None) for own in value.values()):
        return False
    n_layers = value.get("num_hidden_layers")
    return n_layers is None or (is_count(n_layers) and n_layers <= _MAX_LAYERS)


def is_count(value) -> bool:
    """Whether a value from a config is a number of things, one at least."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def write(directory: str | os.PathLike, config: dict, tensors: Mapping[str, torch.Tensor]) -> Path:
    """`Format.write` for tensors by name."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    for name, t in tensors.items():
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
    cards.write(directory, config)
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


def peft_type_of(source: str | os.PathLike, **hub) -> str | None:
    """Of which kind the adapter in a folder or on the Hub says it is; arguments and errors as `Format.read`."""
    return read_config(*find(source, (CONFIG,), hub)).get("peft_type")
