"""What policies have in common that go by all queries of a text, as they were before RoPE."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_kvcache.policies.base import Policy
from hf_kvcache.rope import Rope

QUERIES = 1024  # queries that are looked at at a time


@dataclass
class QueryStatistics(Policy):
    """Adds up something about the queries of a text as they come. A subclass has `added`, and `score`.

    `view.layer_state` holds what `added` returned last, and "n_pads", the padding of every row, `[B, Hkv, 1]`.
    """

    rope: Rope | None = field(default=None, init=False, repr=False, compare=False)

    needs = frozenset({"model"})
    wants_queries = True

    def started(self, q: torch.Tensor, view) -> dict[str, torch.Tensor]:
        """The state before the first queries `[B, Hq, S, D]` of a text: `[B, Hkv, 1, ...]` by name, or empty."""
        return {}

    def added(self, state: dict[str, torch.Tensor], q: torch.Tensor, where: torch.Tensor) -> dict[str, torch.Tensor]:
        """A state to which queries were added.

        Args:
            state: what it was, see `started`.
            q: queries before RoPE, float32 `[B, Hkv, G, S, D]`.
            where: their positions, `[B, Hkv, S]`, counted from the first real token; negative for padding.
        """
        raise NotImplementedError

    def for_model(self, context):
        bound = super().for_model(context)
        bound.rope = context.rope()
        return bound

    def on_queries(self, q, view):
        state = dict(view.layer_state) or self.started(q, view)
        where = view.positions[:, :, -q.shape[2] :]
        n_pads = (where < 0).sum(-1, keepdim=True) + state.pop("n_pads", 0)  # [B, Hkv, 1]
        where = torch.arange(view.tokens_seen - q.shape[2], view.tokens_seen, device=q.device) - n_pads
        if self.rope is not None:
            self.rope.cover(view.tokens_seen, q.device)
        for i in range(0, q.shape[2], QUERIES):
            rows = slice(i, i + QUERIES)
            part = q[:, :, rows]
            if self.rope is not None:
                part = self.rope.unrotate(part, where[:, :1, rows].clamp(min=0))
            state = self.added(state, part.float().unflatten(1, (where.shape[1], -1)), where[:, :, rows])
        view.set_layer_state(n_pads=n_pads, **state)
