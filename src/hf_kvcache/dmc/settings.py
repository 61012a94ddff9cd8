"""What a retrofitted model and its cache must agree on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Literal

MAX_WINDOW = 1 << 20
DEFAULTS = {"dmc": {"window": 12, "scale": 20.0}, "dms": {"window": 256, "scale": 100.0}}


@dataclass(frozen=True)
class Settings:
    """How a model decides, per token and KV head, whether the token before it keeps a row of its own.

    DMC (Nawrot et al. 2024, arXiv 2403.09636) merges a token into the newest row of its head; DMS (Lancucki et al.
    2025, arXiv 2506.05345) drops the token before it, `window` tokens later. Both are trained with the model, which is
    useless with other settings.

    Attributes:
        method: "dmc" or "dms".
        decision: where decisions come from. "borrowed": a channel of keys (DMC) or of the first query head of a group
            (DMS), which attention then does without. "rows": weights of their own in place of those of that channel,
            which `merge_weights` writes there. "linear": weights of their own, beside all channels.
        neuron: the borrowed channel, counted as an index; the released code has the last one.
        offset: subtracted from logits, so that an untrained model keeps everything.
        scale: of logits before the offset; 1 in NVIDIA's DMC checkpoints, more for short retrofits. None means 20 for
            DMC, 100 for DMS.
        tau: temperature of the relaxed decisions of training.
        window: DMC: newest members of a row that its mean is made of, 0 for all of them. DMS: tokens for which a
            condemned one stays visible. None means 12 for DMC, 256 for DMS.
        zero_after_rope: also do without the borrowed channel after RoPE, as the released code does, instead of exact
            relative attention.
        per: "head", or "layer" for decisions common to the KV heads of a layer, whose lengths are then equal.

    Raises:
        ValueError: a value that cannot be.
    """

    method: Literal["dmc", "dms"] = "dmc"
    decision: Literal["borrowed", "rows", "linear"] = "borrowed"
    neuron: int = -1
    offset: float = 5.0
    scale: float | None = None
    tau: float = 0.1
    window: int | None = None
    zero_after_rope: bool = False
    per: Literal["head", "layer"] = "head"

    def __post_init__(self):
        for name, options in (
            ("method", ("dmc", "dms")),
            ("decision", ("borrowed", "rows", "linear")),
            ("per", ("head", "layer")),
        ):
            if getattr(self, name) not in options:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(options)}")
        for name, value in DEFAULTS[self.method].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, kind in (("neuron", int), ("window", int), ("zero_after_rope", bool)):
            if type(getattr(self, name)) is not kind:
                raise ValueError(f"{name}={getattr(self, name)!r} must be of type {kind.__name__}")
        for name in ("offset", "scale", "tau"):
            if not isinstance(getattr(self, name), (int, float)) or not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a positive number")
        if not 0 <= self.window <= MAX_WINDOW:
            raise ValueError(f"window={self.window} must not be negative, nor above {MAX_WINDOW}")

    @property
    def merges(self) -> bool:
        """Whether tokens are averaged into rows (DMC)."""
        return self.method == "dmc"

    @property
    def delay(self) -> int:
        """Tokens for which a row stays visible once the decision has gone against it: 0 for DMC."""
        return 0 if self.merges else self.window

    @property
    def clears_queries(self) -> bool:
        """Whether the channel is taken out of queries after RoPE, too."""
        return self.zero_after_rope and self.ablates

    @property
    def ablates(self) -> bool:
        """Whether a channel is taken from attention."""
        return self.decision != "linear"

    @property
    def digest(self) -> str:
        """What tells these settings from others, 16 hexadecimal digits: a file that says both shows edits."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Settings:
        """Settings out of a JSON object, whole.

        Raises:
            ValueError: fields are missing, unknown or impossible.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or values.keys() != names or None in values.values():
            raise ValueError(f"the settings must say {', '.join(sorted(names))}, and nothing else; they say {values}")
        return cls(**values)
