"""Caches as they are typed: `quant:bits=4,rotate=true`, `keydiff:ratio=0.25`, `keydiff:ratio=0.5+quant:bits=8`.

A part is a name of the registry or of a peer, then its arguments. `+` puts an eviction policy over a cache.
`config:PATH` is a cache that a file describes (`KVCacheConfig`).
"""

from __future__ import annotations

import hashlib
import inspect
import math
from dataclasses import dataclass, field
from pathlib import Path

from transformers import Cache

from hf_kvcache import registry
from hf_kvcache.cache import KVCache
from hf_kvcache.dmc.policies import TrainedEviction
from hf_kvcache.eval.peers import PEERS, is_installed
from hf_kvcache.policies.base import Policy

# what the default comparison runs after the baseline and a peer: a lossless cache, and of every kind those that most
# will choose from
DEFAULT = (
    "dense",
    "quant:bits=8",
    "quant:bits=4",
    "sparse:sparsity=0.7,bits=4",
    "lowrank:rank=0.5,bits=4",
    "snapkv:ratio=0.25",
    "keydiff:ratio=0.25",
    "keydiff:ratio=0.25+sparse:sparsity=0.5,bits=8",
)

# what the types of arguments are called in errors
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a name", "None": "none"}

# arguments that are objects, which the command line composes itself
_OBJECTS = {"self", "policy", "codec", "config", "kwargs", "bases"}


class SpecError(ValueError):
    """A specification that names something that does not exist, or in a way that cannot work."""


@dataclass(frozen=True)
class CacheSpec:
    """A cache that can be built again and again.

    Attributes:
        text: as typed; the name of its row.
        factory: `KVCache` subclass, or the function of a peer.
        knobs: its arguments.
        policy: policy class over it, or None.
        policy_knobs: arguments of the policy.
    """

    text: str
    factory: type[KVCache] | object
    knobs: dict = field(default_factory=dict)
    policy: type[Policy] | None = None
    policy_knobs: dict = field(default_factory=dict)

    @property
    def is_peer(self) -> bool:
        """Whether this is transformers' own cache, not ours."""
        return self.factory in PEERS.values()

    @property
    def is_learned(self) -> bool:
        """Whether the model decides what is kept (DMC, DMS)."""
        return self.policy is not None and issubclass(self.policy, TrainedEviction)

    def build(self, config=None) -> Cache:
        """A new, empty cache for a model with this config."""
        knobs = dict(self.knobs, config=config)
        if self.policy is not None:
            knobs["policy"] = self.policy(**self.policy_knobs)
        return self.factory(**knobs)

    def check(self) -> None:
        """Raise `SpecError` for arguments that no model could make work."""
        if self.is_peer:
            return
        try:
            self.build()
        except (ValueError, TypeError) as error:
            raise SpecError(f"{self.text}: {error}") from error


@dataclass(frozen=True)
class ConfigSpec(CacheSpec):
    """A cache that a file describes. Its text ends in a digest of the file, so that rows of another file differ.

    Attributes:
        config: what the file says.
    """

    config: object = None

    @property
    def is_learned(self):
        return bool(getattr(self.build().policy, "is_trained", False))

    def build(self, config=None):
        return self.config.build(config)


def _config_spec(where: str) -> ConfigSpec:
    from hf_kvcache.cache_config import ConfigError, KVCacheConfig

    path, _, told = where.partition("@") if "@" in Path(where).name else (where, "", "")
    try:
        config = KVCacheConfig.load(path)
    except ConfigError as error:
        raise SpecError(str(error)) from error
    digest = hashlib.sha256(config.to_json().encode()).hexdigest()[:8]
    if told not in ("", digest):
        raise SpecError(f"config:{where}: the file has changed, its digest is {digest} now")
    return ConfigSpec(f"config:{path}@{digest}", KVCache, config=config)


def parse(text: str) -> CacheSpec:
    """Read one specification; raises `SpecError` with the names there are."""
    if text.startswith(("config:", "config=")):
        return _config_spec(text[len("config:") :])
    caches, policies = [], []
    for part in text.split("+"):
        name, _, rest = part.strip().partition(":")
        kind = _kind(name)
        knobs = _knobs(rest, name, kind)
        (policies if inspect.isclass(kind) and issubclass(kind, Policy) else caches).append((kind, knobs))
    if len(caches) > 1 or len(policies) > 1 or (policies and caches and caches[0][0] in PEERS.values()):
        raise SpecError(f"{text!r}: '+' joins one eviction policy and one cache of this package")
    cache = caches[0] if caches else (KVCache, {})
    policy = policies[0] if policies else (None, {})
    return CacheSpec(text, *cache, *policy)


def default_specs(retrofit: str | None = None) -> list[CacheSpec]:
    """The default comparison: ten caches that help to choose, and those of a retrofitted model.

    Args:
        retrofit: what the model is retrofitted for, "dmc" or "dms"; None for nothing.
    """
    return [parse(text) for text in ("dynamic", *_peers()[:1], *DEFAULT, *_of_retrofit(retrofit))]


def all_specs(carries_heads: bool = True, retrofit: str | None = None) -> list[CacheSpec]:
    """The whole comparison: the peers that are installed, then every method of the registry.

    Args:
        carries_heads: whether the model has retaining heads; without, methods that go by them are left out.
        retrofit: what the model is retrofitted for, "dmc" or "dms"; None for nothing.
    """
    texts = ["dynamic", *_peers()]
    for method in registry.METHODS:
        if method.name == "locret" and not carries_heads:
            continue
        kind = registry.load(method.factory)
        plain = f"{method.name}:ratio=0.25" if issubclass(kind, Policy) else method.name
        texts += (plain,) if method.compared is None else method.compared
    return [parse(text) for text in [*texts, *_of_retrofit(retrofit)]]


def _peers() -> list[str]:
    """transformers' own quantised caches, as far as they are installed."""
    return [f"{name}:bits=4" for name in ("quanto", "hqq") if is_installed(name)]


def _of_retrofit(method: str | None) -> list[str]:
    return [] if method is None else [method, f"{method}+quant:bits=8", f"{method}+quant:bits=4"]


def _kind(name: str):
    if name in PEERS:
        return PEERS[name]
    names = [method.name for method in registry.METHODS]
    if name not in names:
        raise SpecError(f"no cache is called {name!r}; there are {', '.join([*PEERS, *names])}")
    return registry.load(registry.method(name).factory)


def _knobs(text: str, name: str, kind) -> dict:
    knobs = {}
    accepted = _accepted(kind)
    for pair in filter(None, text.split(",")):
        key, equals, value = pair.strip().partition("=")
        if not equals:
            raise SpecError(f"{name}: {pair!r} is not of the form argument=value")
        if key not in accepted:
            raise SpecError(f"{name} has no argument {key!r}; it takes {', '.join(accepted)}")
        knobs[key] = _value(value)
        _refuse(knobs[key], accepted[key], f"{name}: {key}={value}")
    return knobs


def _accepted(kind) -> dict[str, str]:
    """Argument names of a factory, and of its base classes while it passes `**kwargs` on, with their annotations."""
    names = {}
    for cls in kind.__mro__ if inspect.isclass(kind) else [kind]:
        parameters = inspect.signature(cls).parameters
        for name, parameter in parameters.items():
            if name not in _OBJECTS:
                names.setdefault(name, "" if parameter.annotation is parameter.empty else str(parameter.annotation))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return names


def _refuse(value, annotation: str, what: str) -> None:
    """Raise `SpecError` for a value of another type than the argument's, and for numbers that none can be."""
    if isinstance(value, float) and not math.isfinite(value):
        raise SpecError(f"{what} is not a finite number")
    if type(value) is int and value < 0 and "float" not in annotation:
        raise SpecError(f"{what} is not a number from 0 up")
    words = [part.strip() for part in annotation.split("|")]
    typed = "None" if value is None else type(value).__name__
    # an argument without an annotation is checked by whoever takes it; a whole number is a float, too
    is_right = not annotation or typed in words or (typed == "int" and "float" in words)
    if not is_right:
        kinds = [_KINDS[word] for word in words if word in _KINDS]
        raise SpecError(f"{what} is not {' or '.join(kinds) or 'something that can be typed'}")


def _value(text: str):
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
