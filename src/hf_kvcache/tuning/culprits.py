"""Which layers and sides are to blame for the loss behind a cache: what is left of it where one of them stays dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from hf_kvcache.cache import KVCache
from hf_kvcache.tuning.follow import Followed, Rows, divergence
from hf_kvcache.tuning.probes import Probe, Text
from hf_kvcache.tuning.sensitivity import blame

N_LAYERS = 3


class NobodyToBlame(ValueError):
    """The rows of a cache cannot be told apart by layer; says why."""


@dataclass(frozen=True)
class Culprit:
    """One side of one layer.

    Attributes:
        layer: its number.
        side: "keys", "values", or "tokens" for both where rows were evicted.
        kl: nats per token, behind the whole cache.
        kl_without: that with this side dense.
        bytes_ratio: what that side would take more, as a share of a dense cache's bytes.
    """

    layer: int
    side: str
    kl: float
    kl_without: float
    bytes_ratio: float

    def __str__(self) -> str:
        change = f"KL {self.kl_without:.4f} instead of {self.kl:.4f}"
        more = f"{100 * self.bytes_ratio:.1f} % of the dense bytes more"
        return f"layer {self.layer} {self.side}: {change} if they stayed dense, for {more}"


def culprits(model, texts: Sequence[Text], make: Callable[[], KVCache]) -> list[Culprit]:
    """The layers that gradients blame most, each side of them, the greatest relief first.

    Args:
        model: causal language model in evaluation mode, all of whose layers have full attention.
        texts: what is read and predicted; each costs a reading, a pass with gradients and two passes per layer blamed.
        make: returns a new cache.

    Raises:
        NobodyToBlame: the model cannot be listened to, or the cache does not show its rows.
    """
    cases = [_Case(model, text, make()) for text in texts]
    shares = [fmean(shares) for shares in zip(*(case.shares for case in cases), strict=True)]
    worst = sorted(range(len(shares)), key=lambda i: -shares[i])[:N_LAYERS]
    kl = fmean(case.kl for case in cases)
    found = [
        Culprit(i, side, kl, fmean(case.kl_without(i, side) for case in cases), cases[0].surplus(i, side))
        for i in worst
        for side in cases[0].sides(i)
    ]
    return sorted(found, key=lambda culprit: culprit.kl_without)


class _Case:
    """One text behind a cache."""

    def __init__(self, model, text: Text, cache: KVCache):
        if not isinstance(cache, KVCache):
            raise NobodyToBlame(f"a {type(cache).__name__} does not show its rows")
        self.probe = Probe(model, text)
        if self.probe.prefill is None:
            raise NobodyToBlame(self.probe.why_not)
        self.cache = self.probe.filled(cache)
        try:
            self.rows = [Rows.of(layer) for layer in self.cache.layers]
            found = blame(self.probe, self.cache)
        except (AttributeError, ValueError) as error:
            raise NobodyToBlame(str(error)) from error
        self.kl, self.shares = found.kl, found.shares

    def sides(self, i: int) -> tuple[str, ...]:
        """What a layer may be blamed for."""
        return ("keys", "values") if self._keeps_all(i) else ("tokens",)

    def kl_without(self, i: int, side: str) -> float:
        """Divergence if this side of a layer stayed dense."""
        own, dense, rows = self.rows[i], self.probe.rows[i], [*self.rows]
        rows[i] = Rows(own.k if side == "values" else dense.k, own.v if side == "keys" else dense.v)
        text = self.probe.text
        followed = Followed(self.probe.model, rows, len(text.context), text.follow, text.scored)
        return divergence(self.probe.expected, followed.logp.detach()).item()

    def surplus(self, i: int, side: str) -> float:
        """Bytes that a side would take more if it stayed dense, as a share of a dense cache's."""
        layer, dense = self.cache.layers[i], self.probe.rows
        n_dense = sum(rows.nbytes for rows in dense)
        if side == "tokens":
            return (dense[i].nbytes - layer.nbytes) / n_dense
        width = layer.head_dim if side == "keys" else layer.v_head_dim
        packed = layer.store.codec_of(side[0]).nbytes_per_token(width, layer.dtype.itemsize)
        per_row = width * layer.dtype.itemsize - packed
        return per_row * layer.store.n_packed * layer.n_kv_heads / n_dense

    def _keeps_all(self, i: int) -> bool:
        rows = self.rows[i]
        return rows.is_there is None and rows.k.shape[2] == self.probe.rows[i].k.shape[2]
