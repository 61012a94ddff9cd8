"""A cache as a JSON file: what it is made of, and what is known of it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from hf_kvcache import codecs, policies  # noqa: F401 - files name the classes that there are
from hf_kvcache.described import described_codec, described_layers, described_policy
from hf_kvcache.hub.spec import cache_of, spec_of
from hf_kvcache.typed import Misfit, build, refuse_depth, shown

FORMAT_VERSION = 1
FILE = "kv_cache_config.json"
DEEPEST = 16  # lists and objects within each other
MOST_BYTES = 2**22


class ConfigError(ValueError):
    """Raised when a file or an object of JSON is no configuration of a cache; names the field."""


@dataclass(frozen=True)
class KVCacheConfig:
    """The arguments of a `KVCache` as plain values: what an exported model has as `config.kv_cache`.

    Attributes:
        policy: a policy as its `spec()`, or None.
        codec, edge_codec: codecs of keys and values as their `spec()`, a list of two, or None.
        per_layer: the argument of that name by the index of the layer as text, codecs as above.
        the others: as in `KVCache`.
        about: what is known of it, for people: the command, the model and text that it was made for, what was measured.

    Raises:
        ConfigError: values that no cache can have; names the field.
    """

    policy: dict | None = None
    codec: list | None = None
    edge_codec: list | None = None
    window: int = 64
    n_sink: int = 0
    edge_layers: int = 0
    per_layer: dict[str, dict] = field(default_factory=dict)
    min_length: int = 0
    exact_prefill: bool = True
    rerotate_keys: bool = False
    max_length: int | None = None
    about: dict = field(default_factory=dict)

    def __post_init__(self):
        try:
            refuse_depth(self.to_dict(), DEEPEST)
            described_policy(self.policy, "policy")
            for name in ("codec", "edge_codec"):
                _pair(getattr(self, name), name)
            described_layers(self.per_layer, "per_layer", _pair)
        except Misfit as error:
            raise ConfigError(str(error)) from None
        self.build()

    @property
    def arguments(self) -> dict:
        """What is not the default of `KVCache`, as `hub.spec.cache_of` takes it."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "about"}
        plain = {name: f.default for name, f in self.__dataclass_fields__.items()} | {"per_layer": {}}
        return {name: value for name, value in values.items() if value != plain[name]}

    def build(self, model_config=None, **options):
        """A new, empty cache.

        Args:
            model_config: of the model; needed where it has layers of linear attention, or some that are not ours.
            options: further arguments of `KVCache`, such as `offloading`.

        Raises:
            ConfigError: its parts do not go together.
        """
        try:
            return cache_of(self.arguments, config=model_config, **options)
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error

    @classmethod
    def from_cache(cls, cache, **about) -> KVCacheConfig:
        """That of a cache, whatever it holds.

        Args:
            about: what is known of it.

        Raises:
            ConfigError: it has what no file can say: bases that were given to it, attributes of its own, offloading.
        """
        from hf_kvcache.persist import own_attributes

        if any(getattr(codec.fitted_part, "bases", None) for codec in cache.all_codecs):
            raise ConfigError("LowRank(bases=...): a configuration holds no bases; attach them to the model instead")
        if own := [name for name in own_attributes(cache) if not name.startswith("_")]:
            raise ConfigError(f"{type(cache).__name__}.{own[0]}: a configuration has the arguments of KVCache alone")
        try:
            return cls(**spec_of(cache), about=about)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def to_dict(self) -> dict:
        """Plain values, `format_version` first."""
        return {"format_version": FORMAT_VERSION, **self.arguments} | ({"about": self.about} if self.about else {})

    @classmethod
    def from_dict(cls, raw) -> KVCacheConfig:
        """That which `to_dict` described.

        Raises:
            ConfigError: a field is unknown, of another type, or cannot be.
        """
        if not isinstance(raw, dict) or "format_version" not in raw:
            raise ConfigError("format_version is missing: this is no configuration of a cache")
        if raw["format_version"] != FORMAT_VERSION or isinstance(raw["format_version"], bool):
            raise ConfigError(f"has format {shown(raw['format_version'])}, this release reads {FORMAT_VERSION}")
        try:
            return build(cls, {name: value for name, value in raw.items() if name != "format_version"}, "")
        except Misfit as error:
            raise ConfigError(str(error).removeprefix(":").removeprefix(".").strip()) from None

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> KVCacheConfig:
        """That of a text; raises `ConfigError` as `from_dict`, and for what is no JSON."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"is no JSON: {error}") from None
        return cls.from_dict(raw)

    def save(self, where: str | os.PathLike) -> Path:
        """Write it to a file (`*.json`), or to `kv_cache_config.json` in a folder, which is made; returns the file."""
        path = _file(where)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def load(cls, where: str | os.PathLike) -> KVCacheConfig:
        """That of a file, or of `kv_cache_config.json` in a folder.

        Raises:
            ConfigError: it is not there, or no configuration; names file and field.
        """
        path = _file(where)
        try:
            if path.stat().st_size > MOST_BYTES:
                raise ConfigError(f"no configuration is larger than {MOST_BYTES} bytes")
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from error


def _file(where: str | os.PathLike) -> Path:
    path = Path(where)
    return path if path.suffix == ".json" and not path.is_dir() else path / FILE


def _pair(raw, where: str):
    """The codecs of keys and values that a list describes; raises `Misfit` for anything else."""
    if raw is None:
        return None
    if not isinstance(raw, list) or len(raw) != 2:
        raise Misfit(f"{where}: {shown(raw)} is no list of two codecs")
    pair = tuple(described_codec(spec, f"{where}.{side}") for side, spec in zip(("keys", "values"), raw))
    if None in pair:
        raise Misfit(f"{where}: one side has a codec and the other has none")
    return pair
