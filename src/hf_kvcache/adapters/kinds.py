"""What the kinds of adapters have in common: configs that are checked, tensors that are read, models that fit.

A kind says what its config holds, of which shapes its tensors are, and what of a model must be equal.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hf_kvcache.adapters import fit
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.files import CONFIG, DTYPES, ROOT, TENSORS, Place, find, read_config, write
from hf_kvcache.adapters.modules import Attention

_MAX_LAYERS = 1 << 14
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def is_count(value) -> bool:
    """Whether a value from a config is a number of things, one at least."""
    return type(value) is int and value > 0


def is_index(value) -> bool:
    """Whether a value from a config is a number of things, or none."""
    return type(value) is int and value >= 0


def or_none(is_right: Callable[[object], bool]) -> Callable[[object], bool]:
    """A check that None passes, too."""
    return lambda value: value is None or is_right(value)


def is_a(*types: type) -> Callable[[object], bool]:
    """Whether a value from a config is of one of these types."""
    return lambda value: isinstance(value, types)


def are_layers(value) -> bool:
    """Whether a value from a config is a list of layers, sorted, one at least."""
    return isinstance(value, list) and value != [] and all(map(is_index, value)) and value == sorted(set(value))


def is_fingerprint(value) -> bool:
    """Whether a value from a config is plain values by name, with as many layers as a model may have."""
    if not isinstance(value, dict) or not all(isinstance(own, str | int | float | None) for own in value.values()):
        return False
    n_layers = value.get("num_hidden_layers")
    return n_layers is None or (is_count(n_layers) and n_layers <= _MAX_LAYERS)


_OF_ALL = {
    "fingerprint": or_none(is_fingerprint),
    "base_model_name_or_path": or_none(is_a(str)),
    "hf_kvcache_version": or_none(is_a(str)),
}


class Kind:
    """One kind of adapter. Subclasses say what is theirs.

    Attributes:
        peft_type: what the config calls it.
        title: what people call it, with its article.
        child: name of the module that carries it on an attention module.
        parts: of every layer, any of which may be missing.
        fields: what its config holds beside what all have, and functions of a value, None where it is missing, that say
            whether it is right.
        config_name: its config for PEFT, among the names of `hf_kvcache.adapters`.
        is_trained: whether its parameters can be, on a model.
        taken: what a module is said to be whose child is no adapter's.
        card: what a README says of it, a `cards.Card`.
        version: of its format, in the config.
    """

    is_trained = True
    version = 1

    # -- what a kind says --------------------------------------------------------------------------------------------

    def check_further(self, config: Mapping, where: str) -> None:
        """Raise `AdapterError` for values that do not go together; each is right by itself."""

    def layers(self, config: Mapping) -> list[int]:
        """Layers that a config speaks of, sorted."""
        return config["layers"]

    def shapes(self, config: Mapping) -> dict[Place, tuple[int, ...]]:
        """Shapes of the tensors that a config speaks of, by layer and part."""
        raise NotImplementedError

    def spoken(self, layer_idx: int, part: str) -> str:
        """A layer and part in words."""
        return f"{part} of layer {layer_idx}"

    def settings(self, config: Mapping):
        """What is to be known beside the tensors, to use them."""
        raise NotImplementedError

    def sizes(self, config: Mapping, attention: Attention) -> Iterable[tuple[str, object, object]]:
        """What must be equal: what it is of, the adapter's, the model's."""
        raise NotImplementedError

    def misfits(self, config: Mapping, model: torch.nn.Module, found: Mapping[int, Attention]) -> list[str]:
        """What else differs, in words, where a model has all layers."""
        return []

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Of the child that carries it."""
        return tuple(f"{self.child}_{part}" for part in self.parts)

    # -- configs -----------------------------------------------------------------------------------------------------

    def config(self, base_model: str | None, fingerprint: dict | None, **own) -> dict:
        """What `adapter_config.json` says; `own` are the values of `fields`."""
        from hf_kvcache import __version__

        return {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "base_model_name_or_path": base_model,
            "format_version": self.version,
            "hf_kvcache_version": __version__,
            "fingerprint": fingerprint,
            **own,
        }

    def check(self, config: Mapping, where: str) -> None:
        """Raise `AdapterError` unless a config says what an adapter must say, and nothing impossible."""
        for name, is_right in (self.fields | _OF_ALL).items():
            if not is_right(config.get(name)):
                raise AdapterError(f"{where}: {name}={config.get(name)!r} is damaged or missing")
        self.check_further(config, where)

    def check_version(self, version, whose: str) -> None:
        """Raise `AdapterError` for a version that this release does not read; `whose` opens the message."""
        if version != self.version:
            raise AdapterError(f"{whose} format_version {version!r}, this release reads {self.version}")

    # -- files -------------------------------------------------------------------------------------------------------

    def name(self, path: str, part: str) -> str:
        """Of a tensor of the attention module at `path`."""
        return f"{ROOT}{path}.{self.child}.{self.child}_{part}"

    def write(
        self,
        directory: str | os.PathLike,
        config: dict,
        tensors: Mapping[Place, torch.Tensor],
        model: torch.nn.Module | None,
    ) -> Path:
        """Write the files; an earlier adapter there is replaced, and no reader finds a mixture of the two.

        Args:
            directory: created if need be.
            config: what `adapter_config.json` shall hold.
            tensors: by layer and part.
            model: whose attention modules they are named after; without it, those of the usual decoder.

        Raises:
            AdapterError: a tensor holds NaN or infinity, or is of a dtype that adapters do not have.
        """
        paths = fit.module_paths(model, self.layers(config))
        named = {self.name(paths[layer_idx], part): t for (layer_idx, part), t in tensors.items()}
        return write(directory, config, named, self.card)

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
