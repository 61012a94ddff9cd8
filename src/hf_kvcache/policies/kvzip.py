"""KVzip: what the model looks at when it repeats the context stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from hf_kvcache.kernels.row_weights import row_weights
from hf_kvcache.policies.ragged import Ragged, best_of_all
from hf_kvcache.policies.weights import in_one_pass, queries_at_once

LEVELS = ("model", "layer", "head")
KEYS = 8192  # that are scored at a time


@dataclass
class KVzip(Ragged):
    """Keep the rows that get the largest attention weights when the prompt is repeated (KVzip, arXiv 2505.23416).

    A prompt is read twice: once as it is, and once more behind itself, chunk by chunk, by queries whose rows are taken
    back. What rebuilds the text serves any question, so nothing has to be known of it. `hf_kvcache.prefill` does both;
    a prompt that comes another way raises. What follows the prompt stays, as in the paper, until another `prefill`.

    A row's score is its largest weight over the queries that repeat it and the heads of its group. As in the paper, the
    softmax is over the chunk that is repeated and its repetition.

    Attributes:
        level: who shares a budget: all heads of the "model" (the paper's choice), those of a "layer", or none ("head").
        chunk: tokens that are repeated at a time.
    """

    n_recent: int = 0
    decode: bool = False
    level: str = "model"
    chunk: int = 2048

    needs = frozenset({"model"})
    state = {"score": torch.float32}
    reads_twice = True
    sets_layer_budgets = True

    def __post_init__(self):
        super().__post_init__()
        if self.level not in LEVELS:
            raise ValueError(f"KVzip: level={self.level!r} is none of {', '.join(LEVELS)}")
        if self.chunk < 1:
            raise ValueError(f"KVzip: chunk={self.chunk} must be at least one token")
        if self.decode:
            raise ValueError("KVzip: decode=True would evict tokens that have no score, before they are read twice")

    def layer_type(self):
        from hf_kvcache.second_pass import TwiceReadLayer

        return TwiceReadLayer

    def second_pass(self, decoder, input_ids, cache, attention_mask=None, request=None):
        from hf_kvcache.second_pass import repeat

        repeat(decoder, input_ids, cache, attention_mask, request)

    def check_states(self):
        raise ValueError("KVzip reads a prompt twice, which the states of linear attention could not forget")

    def should_evict(self, n_kept, tokens_seen, decoding, n_since):
        # the second pass says when
        return False

    def largest_weights(self, q: torch.Tensor, k: torch.Tensor, n_rows: int, view, is_real=None) -> torch.Tensor:
        """What the queries of a repetition say of the rows that they repeat: the largest weight, in `[0, 1]`.

        Args:
            q: those queries after RoPE, `[B, Hq, R, D]`.
            k: keys of the rows, and behind them all of the call, the last of which are those of the queries.
            n_rows: how many rows there are: `n`.
            view: the `KVView` of the layer.
            is_real: False for padding among `k`, boolean `[B, N]`; None where there is none.

        Returns:
            float32 `[B, Hkv, n]`.
        """
        if in_one_pass(q):
            first, positions, asks = k.shape[2] - q.shape[2], torch.arange(k.shape[2]).expand(k.shape[:3]), None
            if is_real is not None:
                positions, asks = positions.masked_fill(~is_real.unsqueeze(1), -1), is_real[:, None, first:]
            knobs = {"scaling": view.scaling, "softcap": view.softcap, "q_is_real": asks, "reduce": "max"}
            return row_weights(q, k, positions, first, **knobs)[..., :n_rows]
        # what is calibrated knows policies
        from hf_kvcache.calibration.importance import reconstruction

        block = queries_at_once(q.shape[:2].numel(), min(k.shape[2], KEYS), q.device), KEYS
        return reconstruction(q, k, view.scaling, n_rows, softcap=view.softcap, is_real=is_real, block=block).exp()

    def score(self, view):  # -> [B, Hkv, N]
        return view.state("score")

    def select(self, scores, positions, tokens_seen, n_fixed, is_final=True):
        return self.select_in_layers([(scores, positions, n_fixed)], tokens_seen)[0]

    def select_in_layers(self, layers: list[tuple], tokens_seen: int) -> list[torch.Tensor]:
        """Rows that stay of several layers, which share a budget where `level` is "model".

        Args:
            layers: scores, positions and `n_fixed` of each, see `select`.
            tokens_seen: tokens the layers have seen.

        Returns:
            Boolean `[B, Hkv, N]` for each.
        """
        n_keep = self.tokens_to_keep(tokens_seen)
        free = [self.masked_scores(s, p, tokens_seen)[..., : s.shape[-1] - n_fixed] for s, p, n_fixed in layers]
        n_each = [max(n_keep - n_fixed, 0) for _, _, n_fixed in layers]
        if self.level == "model":
            best = best_of_all(free, n_each, self.shard)
        elif self.level == "layer":
            best = [best_of_all([own], [n], self.shard)[0] for own, n in zip(free, n_each)]
        else:
            places = [own.topk(min(n, own.shape[-1]), -1).indices for own, n in zip(free, n_each)]
            best = [torch.zeros_like(own, dtype=torch.bool).scatter(-1, at, True) for own, at in zip(free, places)]
        kept = zip(best, layers, strict=True)
        return [self.keep_only(pad(b, (0, n), value=True), p, tokens_seen, n) for b, (_, p, n) in kept]
