"""Policies and codecs out of what a file says of them, checked before anything is made."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_kvcache.codecs.base import Codec
from hf_kvcache.codecs.fitted import refit
from hf_kvcache.policies.base import Policy
from hf_kvcache.typed import Misfit, build, kind_of, shown

SIDES = ("keys", "values")


@dataclass(frozen=True)
class PairEntry:
    """A pair of codecs as `KVCache` takes it.

    Attributes:
        keys, values: what their `spec()` said.
        bases: the sides that had `LowRank(bases=...)`, which a saved cache does not hold.
    """

    keys: dict
    values: dict
    bases: list[str]

    def codecs(self, where: str) -> tuple[Codec, Codec]:
        """The pair; raises `Misfit` where there is no such thing."""
        pair = [described_codec(getattr(self, side), f"{where}.{side}") for side in SIDES]
        return tuple(
            refit(codec, lambda part: replace(part, bases=UnsavedBases())) if side in self.bases else codec
            for side, codec in zip(SIDES, pair, strict=True)
        )


@dataclass(frozen=True)
class LayerOptions:
    """What a layer has of its own, as `KVCache(per_layer=...)` takes it; only what is in the file counts.

    Attributes:
        codec: see `PairEntry`, or None.
        policy: None.
        the others: numbers as in `KVCache` and in policies.
    """

    codec: dict | None = None
    policy: None = None
    ratio: float | None = None
    budget: int | None = None
    window: int = 0
    n_sink: int = 0
    min_length: int = 0


def describe_layers(per_layer: dict[int, dict]) -> dict[str, dict]:
    """What `described_layers` reads."""
    return {
        str(i): options | ({"codec": describe_pair(options["codec"])} if "codec" in options else {})
        for i, options in per_layer.items()
    }


def described_layers(raw: dict[str, dict], where: str, pair_of=None) -> dict[int, dict]:
    """The options of layers that `describe_layers` described; raises `Misfit` for anything else.

    Args:
        pair_of: reads a pair of codecs, as `described_pair`.
    """
    found = {}
    for key, options in raw.items():
        own = f"{where}.{shown(key)[1:-1]}"
        if not (key.isascii() and key.isdecimal() and len(key) < 6 and str(int(key)) == key):
            raise Misfit(f"{own}: no layer has that index")
        if isinstance(options, dict) and "codec" in options and pair_of is not None:
            options = options | {"codec": None}
        build(LayerOptions, options, own)
        found[int(key)] = dict(options)
        if "codec" in options:
            found[int(key)]["codec"] = (pair_of or described_pair)(raw[key]["codec"], f"{own}.codec")
    return found


def describe_pair(pair: tuple[Codec | None, Codec | None] | None) -> dict | None:
    """What `PairEntry` reads."""
    if pair is None or pair[0] is None:
        return None
    bases = [side for side, codec in zip(SIDES, pair, strict=True) if getattr(codec.fitted_part, "bases", None)]
    return {"keys": pair[0].spec(), "values": pair[1].spec(), "bases": bases}


def described_pair(raw, where: str) -> tuple[Codec, Codec] | None:
    """The pair that `describe_pair` described; raises `Misfit` for anything else."""
    return None if raw is None else build(PairEntry, raw, where).codecs(where)


def described_policy(spec, where: str) -> Policy | None:
    """The policy that `spec()` described; raises `Misfit` for anything else."""
    if spec is None:
        return None
    kind = kind_of(spec, "policy", Policy, where)
    if kind.score is Policy.score and not kind.is_trained:
        raise Misfit(f"{where}.policy: a {kind.__name__} is no policy by itself")
    knobs = {
        name: described_policy(value, f"{where}.{name}") if isinstance(value, dict) and "policy" in value else value
        for name, value in spec.items()
        if name != "policy"
    }
    return build(kind, knobs, where)


def described_codec(spec, where: str) -> Codec | None:
    """The codec that `spec()` described; raises `Misfit` for anything else."""
    if spec is None:
        return None
    kind = kind_of(spec, "codec", Codec, where)
    if kind is Codec:
        raise Misfit(f"{where}.codec: {shown(spec['codec'])} is no codec by itself")
    knobs = {
        name: described_codec(value, f"{where}.{name}") if isinstance(value, dict) else value
        for name, value in spec.items()
        if name != "codec"
    }
    return build(kind, knobs, where)


class UnsavedBases:
    """Stands for the bases that a cache was made with, in one that was loaded: saved caches hold rows, not adapters."""

    def check_model(self, module) -> None:
        raise ValueError(
            "this cache was made with LowRank(bases=...), which a saved cache does not hold: the rows that were saved "
            "can go on, but for another text make a new cache with the bases"
        )
