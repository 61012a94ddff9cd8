"""Locret: trained retaining heads say which tokens stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_kvcache.adapters.modules import attached_heads
from hf_kvcache.policies.base import Policy, topk_indices


@dataclass
class Locret(Policy):
    """Keep the tokens that the model's retaining heads score highest (Locret, arXiv 2410.01805).

    A token is scored once, when it comes, from its query, key and value before RoPE. Between two chunks of a prompt the
    newest `stabilizers` rows stay whatever their score, because the heads were trained on what later text asks for,
    not on continuing a sentence; when the prompt is complete, scores alone decide, but for the `n_recent` tail.

    The paper's budget excludes that tail (its local tokens), ours includes it; the paper forces no sinks (`n_sink=0`).

    Attributes:
        stabilizers: rows protected between chunks; None picks 2,500 as in the paper, or a quarter of the budget if that
            is less.
        decode: whether to evict while decoding (the paper does not). If not, decoded tokens are not scored: they stay,
            the older ones going first should they ever fill the budget.
    """

    n_recent: int = 100
    decode: bool = False
    stabilizers: int | None = None

    state = {"score": torch.float32}
    defer_prefill_eviction = True

    def __post_init__(self):
        super().__post_init__()
        if self.stabilizers is not None and self.stabilizers < 0:
            raise ValueError(f"Locret: stabilizers={self.stabilizers} must not be negative")

    def on_forward(self, view):
        heads = attached_heads(view.module)
        if heads is None:
            raise ValueError(
                f"layer {view.layer.layer_idx}: the model carries no retaining heads, which Locret goes by; "
                "trainers/train_retaining_heads.py trains them, hf_kvcache.adapters.attach(model, folder) attaches them"
            )
        is_scored = self.decode or view.is_prefill or not view.layer.is_decoding
        view.layer.store.dense["score"][:, :, -view.n_new :] = heads.scores() if is_scored else float("inf")

    def score(self, view):  # -> [B, Hkv, N]
        return view.state("score")

    def masked_scores(self, scores, positions, tokens_seen):
        # unscored rows outlive all others, the newest of them longest
        scores = torch.where(scores == float("inf"), 1e6 + positions, scores)
        return super().masked_scores(scores, positions, tokens_seen)

    def select(self, scores, positions, tokens_seen, n_fixed, is_final=True):
        masked = self.masked_scores(scores, positions, tokens_seen)
        n_keep = self.tokens_to_keep(tokens_seen)
        if not is_final:
            n = min(n_keep // 4, 2500) if self.stabilizers is None else min(self.stabilizers, n_keep)
            newest = masked[..., masked.shape[-1] - n :]
            newest.masked_fill_(newest > float("-inf"), float("inf"))
        return topk_indices(masked, max(n_keep - n_fixed, 0), n_fixed)
