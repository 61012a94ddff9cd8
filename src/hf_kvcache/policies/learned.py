"""DMC and DMS: the model itself decides which tokens keep a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hf_kvcache.policies.base import Policy


@dataclass
class Learned(Policy):
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

    is_ragged = decides = True
    takes_budget = "no"
    method: ClassVar[str] = ""


@dataclass
class DMC(Learned):
    """Merge a token into the newest row of its head, or give it a row (DMC, Nawrot et al. 2024, arXiv 2403.09636)."""

    method = "dmc"


@dataclass
class DMS(Learned):
    """Drop a token once it is a window old, or keep it (DMS, Lancucki et al. 2025, arXiv 2506.05345)."""

    method = "dms"
