"""What a layer may be made of, and caches made of such choices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hf_kvcache.cache import KVCache
from hf_kvcache.codecs import LowRank, Quantize, Sparse
from hf_kvcache.codecs.base import Codec
from hf_kvcache.layer_settings import with_budget
from hf_kvcache.policies.base import Policy

BITS = ("8", "4", "3", "2")
SPARSE = ("sparse0.5:4", "sparse0.7:4")
RANKS = ("rank0.5:4", "rank0.375:4", "rank0.25:4")
RATIOS = (0.7, 0.5, 0.35, 0.25, 0.17, 0.11, 0.07)
KEEP_ALL = 1.0


@dataclass(frozen=True)
class Choice:
    """What one layer is made of.

    Attributes:
        ratio: share of the tokens that stay, 1 for all of them.
        keys, values: names of codecs, see `codec_of`.
    """

    ratio: float
    keys: str
    values: str

    @property
    def pair(self) -> tuple[Codec, Codec]:
        """Its codecs."""
        return codec_of(self.keys), codec_of(self.values)


def codec_of(name: str) -> Codec:
    """The codec called "4" (bits, a scale per token), "4c" (per channel), "sparse0.5:4" or "rank0.5:4" (then bits)."""
    part, _, bits = name.rpartition(":")
    integers = Quantize(int(bits.rstrip("c")), axis="channel" if bits.endswith("c") else "token")
    if part.startswith("sparse"):
        return Sparse(float(part.removeprefix("sparse"))) >> integers
    return LowRank(share_of(name)) >> integers if part else integers


def share_of(name: str) -> float:
    """The share of the directions in the name of a rank."""
    return float(name.partition(":")[0].removeprefix("rank"))


@dataclass(frozen=True)
class Menu:
    """What layers may choose from.

    Attributes:
        policy: with any ratio, or None.
        n_dense: newest rows that stay dense.
        names: codecs of both sides; keys of layers that keep all tokens have those of bits per channel, too.
        ratios: shares of the tokens that layers with the policy may keep; one where it `is_shared`.
    """

    policy: Policy | None
    n_dense: int
    names: tuple[str, ...] = (*BITS, *SPARSE)
    ratios: tuple[float, ...] = RATIOS

    def __str__(self) -> str:
        if self.policy is None:
            return "all tokens"
        name = type(self.policy).__name__
        return f"{name} {self.ratios[0]}" if self.is_shared else name

    @property
    def is_shared(self) -> bool:
        """Whether the policy shares tokens out among layers (PyramidKV, KVzip), which then choose codecs alone."""
        return self.policy is not None and self.policy.sets_layer_budgets

    @property
    def keys_of_all(self) -> tuple[str, ...]:
        """Codecs of keys where all tokens stay."""
        return (*self.names, *(f"{name}c" for name in self.names if name.isdecimal() and name != "8"))

    def choices(self) -> list[Choice]:
        """All of them."""
        kept = [] if self.is_shared else [(KEEP_ALL, self.keys_of_all)]
        kept += [(ratio, self.names) for ratio in self.ratios] if self.policy is not None else []
        return [Choice(ratio, k, v) for ratio, keys in kept for k in keys for v in self.names]

    def cache(self, choices: Sequence[Choice], layers: Sequence[int], config=None) -> KVCache:
        """An empty cache in which each of `layers` is what was chosen for it.

        What most layers have is said once, of the cache.
        """
        common = Counter(c for c in choices if self.policy is None or c.ratio < KEEP_ALL).most_common(1)
        if not common:
            # nothing is evicted
            return Menu(None, self.n_dense, self.names).cache(choices, layers, config)
        common = common[0][0]
        policy = None if self.policy is None else with_budget(self.policy, ratio=common.ratio)
        own = {i: self._options(c, common) for i, c in zip(layers, choices, strict=True) if c != common}
        return KVCache(policy, common.pair, window=self.n_dense, per_layer=own, config=config)

    def _options(self, choice: Choice, common: Choice) -> dict:
        options = {} if choice.pair == common.pair else {"codec": choice.pair}
        if choice.ratio != common.ratio:
            options |= {"policy": None} if choice.ratio == KEEP_ALL else {"ratio": choice.ratio}
        return options

    def one_layer(self, layer_idx: int, choice: Choice, config=None) -> KVCache:
        """An empty cache in which one layer is what was chosen for it."""
        policy = None
        if choice.ratio < KEEP_ALL:
            policy = with_budget(self.policy, ratio=choice.ratio)
        return KVCache(policy, per_layer={layer_idx: {"codec": choice.pair}}, window=self.n_dense, config=config)


def menus_of(policy: Policy | None, n_dense: int, names: Sequence[str]) -> list[Menu]:
    """The menus with one policy: one, or one for every ratio where layers have no ratios of their own."""
    menu = Menu(policy, n_dense, tuple(name for name in names if _is_taken(name, policy)))
    return [replace(menu, ratios=(ratio,)) for ratio in RATIOS] if menu.is_shared else [menu]


def _is_taken(name: str, policy: Policy | None) -> bool:
    """Whether a policy can evict rows of a codec."""
    pair = (codec_of(name),) * 2
    try:
        KVCache(policy, pair)
    except ValueError:
        return False
    return True
