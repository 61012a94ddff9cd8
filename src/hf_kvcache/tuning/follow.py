"""What comes after a context, read over rows of it that are given, and what its predictions owe to every layer.

The model reads in one forward pass; every layer attends to given rows of the context, such as those that a compressed
layer decodes, and adds nothing to what attention returns: a leaf, whose gradients say how predictions hang on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import log_softmax

from hf_kvcache.cache import KVCache
from hf_kvcache.compat import cache_argument
from hf_kvcache.layer import KVLayer
from hf_kvcache.view import KVView


class Rows(NamedTuple):
    """Rows of the context in one layer, in any order.

    Attributes:
        k, v: keys after RoPE and values, `[1, Hkv, N, D]`.
        is_there: False behind the last row of a head that has fewer than others, boolean `[1, Hkv, N]`; None where all
            heads have as many.
    """

    k: torch.Tensor
    v: torch.Tensor
    is_there: torch.Tensor | None = None

    @classmethod
    def of(cls, layer: KVLayer) -> Rows:
        """Those that a layer holds, decoded."""
        store = layer.store
        if not store.is_ragged:
            return cls(*store.logical_rows())
        k, v = (torch.cat(parts, 2) for parts in zip(*store.blocks(layer.tokens_seen), strict=True))
        return cls(k, v, store.positions >= 0)

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        return self.k.nbytes + self.v.nbytes


@dataclass(frozen=True)
class Heard:
    """What the attention of one layer was called with after the context, and what it returned.

    Attributes:
        query: `[1, Hq, S, D]` after RoPE.
        k, v: the new rows, `[1, Hkv, S, D]`.
        out: `[1, S, Hq, D]`, float32.
        leaf: zeros that were added to it.
        scaling, softcap: of the scores.
    """

    query: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    leaf: torch.Tensor
    scaling: float
    softcap: float | None

    def attend(self, rows: Rows) -> torch.Tensor:
        """What attention returns over other rows of the context, `[1, S, Hq, D]`."""
        return attend(self.query, rows, Rows(self.k, self.v), self.scaling, self.softcap)


def attend(q: torch.Tensor, rows: Rows, new: Rows, scaling: float, softcap: float | None = None) -> torch.Tensor:
    """Causal attention in float32 over rows that all queries see, and new ones: `[1, S, Hq, D]`."""
    k, v = (torch.cat(pair, 2).float() for pair in zip(rows[:2], new[:2], strict=True))
    n_new, group = q.shape[2], q.shape[1] // k.shape[1]
    q = q.float().unflatten(1, (-1, group)).flatten(2, 3)  # [1, Hkv, G * S, D]
    scores = (q @ k.mT * scaling).unflatten(2, (group, n_new))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = torch.ones(n_new, n_new, dtype=torch.bool, device=q.device).triu(1)
    seen, own = scores[..., :-n_new], scores[..., -n_new:].masked_fill(hidden, float("-inf"))
    if rows.is_there is not None:
        seen = seen.masked_fill(~rows.is_there[:, :, None, None], float("-inf"))
    scores = torch.cat([seen, own], -1)
    out = scores.softmax(-1).flatten(2, 3) @ v  # [1, Hkv, G * S, D]
    return out.unflatten(2, (group, n_new)).flatten(1, 2).transpose(1, 2)


class _Given(KVLayer):
    """A layer that attends to given rows and keeps none."""

    def __init__(self, layer_idx: int, rows: Rows, n_context: int):
        super().__init__(layer_idx)
        self._rows, self._n_context = rows, n_context
        self.heard: Heard | None = None

    def get_seq_length(self):
        return self._n_context

    def append(self, k, v):
        self.batch_size, self.n_kv_heads, _, self.head_dim = k.shape
        self.dtype, self.device, self.tokens_seen = k.dtype, k.device, self._n_context + k.shape[2]
        return KVView(self, k, v, is_prefill=False)

    def get_mask_sizes(self, query_length):
        return self._n_context + query_length, 0

    def prepare(self, call):
        if call.unserved or call.sinks is not None:
            raise ValueError(f"layer {self.layer_idx}: this model's attention asks for more than rows and a softcap")

    def attend(self, call):
        new = Rows(call.view.new_k, call.view.new_v)
        out = attend(call.query, self._rows, new, call.scaling, call.softcap)
        leaf = torch.zeros_like(out).requires_grad_()
        kept = (t.detach() for t in (call.query, new.k, new.v, out))
        self.heard = Heard(*kept, leaf, call.scaling, call.softcap)
        return (out + leaf).to(call.query.dtype), None

    def compress(self, call):
        pass


class _Following(KVCache):
    """A cache of given layers."""

    def __init__(self, config, rows: Sequence[Rows], n_context: int):
        self._given = [_Given(i, own, n_context) for i, own in enumerate(rows)]
        super().__init__(config=config)

    def _new_layer(self, layer_idx):
        return self._given[layer_idx]


class Followed:
    """Predictions of what comes after a context, over given rows of it.

    Args:
        model: causal language model in evaluation mode; its weights get no gradients.
        rows: of every layer.
        n_context: tokens of the context, whatever is left of its rows.
        ids: what comes after it.
        scored: places in `ids` whose predictions count.

    Attributes:
        heard: what every layer did.
        logp: log-probabilities of the next token `[n, vocab]` at those places.
    """

    def __init__(self, model, rows: Sequence[Rows], n_context: int, ids: list[int], scored: list[int]):
        cache = _Following(model.config, rows, n_context)
        fed = torch.tensor([ids], device=model.device)
        trained = [p for p in model.parameters() if p.requires_grad]
        try:
            # gradients are of what attention returns
            for p in trained:
                p.requires_grad_(False)
            with torch.enable_grad():
                logits = model(fed, **cache_argument(cache), use_cache=True).logits[0, scored]
                self.logp = log_softmax(logits.float(), -1)
        finally:
            for p in trained:
                p.requires_grad_(True)
        self.heard: list[Heard] = [layer.heard for layer in cache.layers]

    def samples(self, n: int, seed: int = 0) -> list[torch.Tensor]:
        """Gradients of the log-probabilities of tokens that the model draws itself, `[n, 1, S, Hq, D]` of each layer.

        Their second moments are the Fisher information: with them half the square of what a change of attention does
        to drawn tokens is the divergence that it causes.
        """
        generator = torch.Generator().manual_seed(seed)
        # no token of small probability may be drawn differently by another number of threads
        p = self.logp.detach().double().exp().cpu()
        drawn = [torch.multinomial(p, 1, generator=generator).to(self.logp.device) for _ in range(n)]
        found = [self._gradients(self.logp.gather(1, tokens).sum(), i + 1 < n) for i, tokens in enumerate(drawn)]
        return [torch.stack(own) for own in zip(*found, strict=True)]

    def let_go(self, *_) -> Followed:
        """Forget the graph of gradients, of which there can be no more."""
        self.logp = self.logp.detach()
        return self

    def gradients_of(self, loss: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        """Gradients `[1, S, Hq, D]` of a loss of `logp` with respect to what the attention of each layer returns."""
        return self._gradients(loss(self.logp), False)

    def _gradients(self, loss: torch.Tensor, again: bool) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, [heard.leaf for heard in self.heard], retain_graph=again)


def divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL of log-probabilities `[n, vocab]` from those expected, nats, mean over the `n`."""
    return (expected.exp() * (expected - found)).sum(-1).mean()
