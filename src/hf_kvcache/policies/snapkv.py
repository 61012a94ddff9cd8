"""SnapKV: keep what the last tokens of the prompt attend to, and its neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from hf_kvcache.policies.window import WindowPolicy, check_kernel, pool

TIE = 1e-4  # how much a row's own votes count beside the pooled ones


@dataclass
class SnapKV(WindowPolicy):
    """Keep the tokens that the newest `n_queries` queries vote for (SnapKV, arXiv 2404.14469).

    The score is the sum of those queries' attention weights, pooled over neighbouring rows, so that a token stays
    together with its surroundings; the window itself stays. Weights are averaged over the query heads of a group,
    where the published code repeats keys and values for every query head; a ten-thousandth of a row's own votes is
    added, which decides between neighbours of equal score. The paper evicts after the prompt only,
    which is `decode=False`; while decoding, the window is the newest tokens.

    Attributes:
        n_queries: the newest queries that vote, and stay (the paper's observation window).
        kernel: rows over which votes are pooled.
        pooling: "max" or "avg".
    """

    kernel: int = 7
    pooling: str = "max"

    def __post_init__(self):
        super().__post_init__()
        check_kernel(self, self.kernel)
        if self.pooling not in ("max", "avg"):
            raise ValueError(f'{type(self).__name__}: pooling={self.pooling!r} must be "max" or "avg"')

    def score(self, view):  # -> [B, Hkv, N]
        votes = self.votes(view)
        # neighbours share their maximum: which of them stay must not hang on how the device sorts
        return pool(votes, view.positions, self.kernel, self.pooling) + TIE * votes
