"""A threshold instead of a budget: every head keeps what is worth keeping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_kvcache.policies.ragged import Ragged
from hf_kvcache.policies.wrapper import Wrapper


@dataclass
class Threshold(Wrapper, Ragged):
    """Keep rows scored `threshold` or more, or the fewest that hold a `share` of their head's scores.

    How much stays depends on the text, so `budget` and `ratio` are upper bounds here, and optional. An absolute
    threshold suits trained scores (KVzap, arXiv 2601.07891); a share suits attention weights.

    Attributes:
        threshold: on the scale of the scorer's scores.
        share: of the sum of a head's scores, which must not be negative, `0 < share <= 1`.
    """

    threshold: float | None = None
    share: float | None = None

    takes_budget = "maybe"
    # whether scores of this text have been seen not to be negative
    _has_looked: ClassVar[bool] = False

    def __post_init__(self):
        if (self.threshold is None) == (self.share is None):
            raise ValueError("Threshold: give either threshold= (a score) or share= (of the scores of a head)")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"Threshold: share={self.share} is not in (0, 1]")
        super().__post_init__()

    def select(self, scores, positions, tokens_seen, n_fixed, is_final=True):
        scores = scores.float().nan_to_num(0.0).masked_fill(positions < 0, float("-inf"))
        masked = self.masked_scores(scores, positions, tokens_seen)
        fixed = masked[..., masked.shape[-1] - n_fixed :]
        fixed.masked_fill_(fixed > float("-inf"), float("inf"))
        ranked, order = masked.sort(-1, descending=True)
        if self.threshold is not None:
            is_wanted = ranked >= self.threshold
        else:
            own = scores.gather(-1, order).masked_fill(positions.gather(-1, order) < 0, 0)
            # decoding on a device does not wait for it to say what the prompt has said already
            if (scores.device.type == "cpu" or not self._has_looked) and (own < 0).any():
                raise ValueError(f"Threshold: scores of {type(self.scorer).__name__} are negative; use threshold=")
            self._has_looked = True
            before = own.cumsum(-1) - own
            is_wanted = before < self.share * own.sum(-1, keepdim=True)
            # the sum of all is reached before the last row where that adds less than rounding
            is_wanted |= self.share == 1
        is_wanted[..., self.tokens_to_keep(tokens_seen) :] = False
        is_wanted = torch.zeros_like(is_wanted).scatter(-1, order, is_wanted)
        return self.keep_only(is_wanted, positions, tokens_seen, n_fixed)
