"""ChunkKV: tokens stay or go together with their neighbours in the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_kvcache.policies.wrapper import Wrapper


@dataclass
class ChunkKV(Wrapper):
    """Keep whole chunks of neighbouring tokens, by the mean score of their rows (ChunkKV, arXiv 2502.00299, section 3).

    arXiv 2502.00299. The text behind the sinks is cut into chunks of `chunk_size` positions; a chunk is worth the mean
    of the scores of its rows that may go, so that one that reaches into the recent tokens is judged like the others.
    Each head fills its budget with its best chunks. All heads keep equally many rows, so the last chunk to fit is cut:
    its oldest rows stay, and no more than `budget` rows ever do. Sinks, recent tokens and layer budgets are the
    scorer's.

    What is left of a cut chunk is a shorter chunk with the same place in the text: while decoding it is judged by the
    mean of the rows it still has. So is one that loses rows as they leave the recent tokens before the others.

    The paper sums the attention of a window to the rows of a chunk of 10 (`scorer=SnapKV(kernel=1)`), evicts from the
    prompt alone (`decode=False`), and lets neighbouring layers share a choice, which ours do not.

    Attributes:
        chunk_size: positions of a chunk; the paper finds 10 to 20 best.
    """

    chunk_size: int = 10

    def __post_init__(self):
        super().__post_init__()
        if self.chunk_size < 1:
            raise ValueError(f"ChunkKV: chunk_size={self.chunk_size} must be at least 1")

    def tokens_to_keep(self, tokens_seen):
        # layers may have budgets of their own
        return self.scorer.tokens_to_keep(tokens_seen)

    def is_protected(self, positions, tokens_seen):
        return self.scorer.is_protected(positions, tokens_seen)

    def score(self, view):  # -> [B, Hkv, N]
        scores, positions = self.scorer.score(view).float().nan_to_num(0.0, posinf=float("inf")), view.positions
        is_real = positions >= 0
        may_go = is_real & ~self.is_protected(positions, view.tokens_seen)
        first = torch.where(is_real, positions, view.tokens_seen).amin(-1, keepdim=True)
        chunk = ((positions - first - self.scorer.n_sink).clamp(min=0) // self.chunk_size).long()
        empty = scores.new_zeros(*scores.shape[:2], view.tokens_seen // self.chunk_size + 1)
        total = empty.scatter_add(-1, chunk, scores.masked_fill(~may_go, 0.0))
        n = empty.scatter_add(-1, chunk, may_go.float()).clamp(min=1)
        return (total / n).gather(-1, chunk)

    def select(self, scores, positions, tokens_seen, n_fixed, is_final=True):
        # in the order of the text, so that equal chunks stay apart and the oldest rows of a chunk come first
        order = positions.argsort(dim=-1, stable=True)
        order = order.gather(-1, scores.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
        places = torch.arange(scores.shape[-1], 0, -1, device=scores.device, dtype=scores.dtype).expand(scores.shape)
        ranks = torch.empty_like(scores).scatter_(-1, order, places)
        # infinite where a scorer says so of rows that it has not seen
        ranks = torch.where(scores == float("inf"), scores, ranks)
        return self.scorer.select(ranks, positions, tokens_seen, n_fixed, is_final)
