"""StreamingLLM: attention sinks and the recent window."""

from __future__ import annotations

from dataclasses import dataclass

from hf_kvcache.policies.base import Policy


@dataclass
class Streaming(Policy):
    """Keep the first `n_sink` tokens and the newest ones (StreamingLLM, arXiv 2309.17453, section 3.2).

    Positions stay those of the text; the paper re-numbers them inside the window.
    """

    def score(self, view):  # -> [B, Hkv, N]
        return view.positions.float()
