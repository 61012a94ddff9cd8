"""A second pass over a prompt: it is repeated behind itself, and queries of the repetition say which rows stay."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch

from hf_kvcache.compat import cache_argument
from hf_kvcache.layer import KVLayer

LEAD = 8  # tokens before a chunk that say where its repetition begins
BLOCK = 4096  # rows that are decoded at a time


@dataclass(frozen=True)
class Chunk:
    """Tokens of a prompt that a call repeats.

    Attributes:
        start, stop: their positions.
        n_asked: tokens of the call before the repetition.
        is_real: False for padding among them and the tokens of the call, `[B, n + S]`; None where there is none.
        weights: what the policy has said of them, by layer, if it has been asked before; takes what it says now.
    """

    start: int
    stop: int
    n_asked: int
    is_real: torch.Tensor | None
    weights: dict[int, torch.Tensor] = field(default_factory=dict)


class TwiceReadLayer(KVLayer):
    """A layer whose prompt stays as it came until it has been repeated.

    Attributes:
        repeated: what a call of the second pass repeats; None outside it.
    """

    repeated: Chunk | None = None
    _waits = False

    def prepare(self, call):
        self._waits = call.view.cache is not None and call.view.cache.prompt_incomplete is not None
        if call.view.is_prefill and call.n_new > 1 and not self._waits:
            name = type(self.policy).__name__
            # as it was before: nothing else of this text is there
            self.reset()
            raise ValueError(
                f"{name} reads a prompt twice before anything is evicted: call "
                "hf_kvcache.prefill(model, input_ids, cache), from which model.generate(input_ids, cache=cache) goes on"
            )
        super().prepare(call)

    def compress(self, call):
        if self.repeated is None:
            super().compress(call)
            return
        with torch.no_grad():
            self._score(call, self.repeated)

    def _score(self, call, chunk: Chunk) -> None:
        """Raise the scores of the rows of a chunk to the weights that its repetition gives them."""
        places = self._places(chunk.start, chunk.stop)
        if self.layer_idx not in chunk.weights:
            chunk.weights[self.layer_idx] = self._weights(call, chunk, places)
        score = self.store.state("score")
        self.store.set_state("score", score.scatter_reduce(2, places, chunk.weights[self.layer_idx], "amax"))

    def _weights(self, call, chunk: Chunk, places: torch.Tensor) -> torch.Tensor:
        k = torch.cat([self._keys(places), self.store.dense["k"][:, :, -call.n_new :]], 2)
        is_real = None if chunk.is_real is None else chunk.is_real.to(k.device)
        queries, n = call.query[:, :, chunk.n_asked :], chunk.stop - chunk.start
        return self.policy.largest_weights(queries, k, n, self._view(), is_real)

    def _places(self, start: int, stop: int) -> torch.Tensor:
        """Where in view order the tokens `[start, stop)` are, int64 `[B, Hkv, n]`; 0 for padding."""
        positions = self.store.positions.long()
        is_asked = (positions >= start) & (positions < stop)
        # what was not asked for goes to a place behind all
        index = torch.where(is_asked, positions - start, stop - start)
        order = torch.arange(index.shape[2], device=index.device).expand_as(index)
        return order.new_zeros(*index.shape[:2], stop - start + 1).scatter_(2, index, order)[..., :-1]

    def _keys(self, places: torch.Tensor) -> torch.Tensor:
        """Dense keys `[B, Hkv, n, D]` at these places, read block by block."""
        start, found = 0, self.store.dense["k"].new_zeros(*places.shape, self.head_dim)
        for (k,) in self.store.blocks(BLOCK, "k"):
            is_here = (places >= start) & (places < start + k.shape[2])
            if is_here.any():
                local = (places - start).clamp(0, k.shape[2] - 1).unsqueeze(-1).expand_as(found)
                found = torch.where(is_here.unsqueeze(-1), k.gather(2, local), found)
            start += k.shape[2]
        return found

    def _commit(self, is_final):
        if not self._waits:
            super()._commit(is_final)

    def take_back(self, tokens_seen: int) -> None:
        """Forget rows that came after so many tokens, none of which has been packed."""
        n = self.tokens_seen - tokens_seen
        self.store.dense.truncate(self.store.dense.n_tokens - n)
        self.tokens_seen, self.repeated = tokens_seen, None

    @torch.no_grad()
    def end_pass(self, kept: torch.Tensor) -> None:
        """Let go of all rows but `kept`, boolean `[B, Hkv, N]`, and pack."""
        self._waits = False
        self._keep(self._view(), kept)
        # the repetition has made room for itself
        self.store.dense.copy_storage()
        self._commit(is_final=True)


def repeat(decoder, input_ids, cache, attention_mask=None, request=None) -> None:
    """Feed the tokens of a cache again that have not been repeated yet, score rows, and evict.

    The rows of the repetition are taken back after every chunk.

    Args:
        decoder: the model without its head.
        input_ids: `[B, T]`, all that the cache has seen.
        cache: under a policy that `reads_twice`.
        attention_mask: `[B, T]`, zeros for left padding.
        request: ids `[n]` of a sentence that asks for the repetition, fed before every chunk.
    """
    policy, n_seen = cache.policy, input_ids.shape[1]
    ours = [layer for layer in cache.layers if isinstance(layer, TwiceReadLayer)]
    first = min((layer.last_eviction_check for layer in ours), default=n_seen)
    if first == n_seen:
        return
    request = input_ids[:, :0] if request is None else request.view(1, -1).to(input_ids).expand(len(input_ids), -1)
    for start in range(first, n_seen, policy.chunk):
        stop = min(start + policy.chunk, n_seen)
        part, options, is_real = slice(max(start - LEAD, 0), stop), {}, None
        fed = torch.cat([request, input_ids[:, part]], 1)
        if attention_mask is not None:
            new = torch.cat([torch.ones_like(request), attention_mask[:, part]], 1)
            whole = torch.cat([attention_mask, new], 1)
            is_real = torch.cat([attention_mask[:, start:stop], new], 1) != 0
            positions = (whole.cumsum(-1) - 1).clamp(min=0)[:, n_seen:]
            options = {"attention_mask": whole, "position_ids": positions}
        chunk = Chunk(start, stop, request.shape[1], is_real)
        theirs = [(layer, copy.deepcopy(vars(layer))) for layer in cache.layers if layer not in ours]
        try:
            for layer in ours:
                layer.repeated = chunk
            decoder(fed, **cache_argument(cache), use_cache=True, **options)
        finally:
            for layer in ours:
                layer.take_back(n_seen)
            for layer, before in theirs:
                vars(layer).update(before)
    scored = [(layer.store.state("score"), layer.store.positions, layer.store.n_fixed) for layer in ours]
    for layer, kept in zip(ours, ours[0].policy.select_in_layers(scored, n_seen), strict=True):
        layer.end_pass(kept)
