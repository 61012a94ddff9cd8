"""DMC and DMS: the model itself decides which tokens keep a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hf_kvcache.policies.base import Policy
from hf_kvcache.policies.ragged import check_pages


@dataclass
class TrainedEviction(Policy):
    """A retrofitted model decides, token by token and head by head; there is nothing to set here.

    Rows are encoded as they are written, the newest among them, so the `window` of a cache says nothing.

    Class attributes:
        method: what the model must have been retrofitted for.
    """

    budget: int | None = field(default=None, init=False)
    ratio: float | None = field(default=None, init=False)
    n_sink: int = field(default=0, init=False)
    n_recent: int = field(default=0, init=False)
    decode: bool = field(default=True, init=False)
    interval: int = field(default=1, init=False)

    is_ragged = is_trained = True
    takes_budget = "no"
    method: ClassVar[str] = ""

    def layer_type(self):
        from hf_kvcache.dmc.layer import TrainedLayer

        return TrainedLayer

    def store_type(self):
        from hf_kvcache.dmc.store import TrainedStore

        return TrainedStore

    def check_cache(self, cache) -> None:
        super().check_cache(cache)
        check_pages(self, cache)
        given = {
            "rerotate_keys": cache.rerotate_keys,
            "max_length": cache.max_length is not None,
            "exact_prefill": not cache.exact_prefill,
        }
        for name, is_given in given.items():
            if is_given:
                raise ValueError(
                    f"{type(self).__name__}: the model decides how many rows there are, and places them itself; "
                    f"{name}= does not go with that"
                )

    def check_states(self) -> None:
        raise ValueError(f"{type(self).__name__} does not go with layers that have linear attention, too")

    def check_recording(self) -> None:
        raise ValueError(
            f"{type(self).__name__} cannot take tokens back, which speculative decoding asks for: merged and "
            "overwritten rows are gone; generate without an assistant"
        )


@dataclass
class DMC(TrainedEviction):
    """Merge a token into the newest row of its head, or give it a row (DMC, arXiv 2403.09636)."""

    method = "dmc"


@dataclass
class DMS(TrainedEviction):
    """Drop a token once it is a window old, or keep it (DMS, arXiv 2506.05345)."""

    method = "dms"
