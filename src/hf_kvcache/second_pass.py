"""A second pass over a prompt: it is repeated behind itself, and queries of the repetition say which rows stay."""

from __future__ import annotations

import copy

import torch

from hf_kvcache.compat import cache_argument
from hf_kvcache.layer import KVLayer

LEAD = 8  # tokens before a chunk that say where its repetition begins


class TwiceReadLayer(KVLayer):
    """A layer whose prompt stays as it came until it has been repeated.

    Attributes:
        is_counted: which of the tokens of a call repeat the prompt, boolean `[B, S]`; None outside the second pass.
    """

    is_counted: torch.Tensor | None = None
    _waits = False

    def prepare(self, call):
        self._waits = call.view.cache is not None and call.view.cache.prompt_incomplete is not None
        if call.view.is_prefill and call.n_new > 1 and not self._waits:
            name = type(self.policy).__name__
            raise ValueError(
                f"{name} reads a prompt twice before anything is evicted: begin with a new cache and call "
                "hf_kvcache.prefill(model, input_ids, cache), from which model.generate(input_ids, cache=cache) goes on"
            )
        super().prepare(call)

    def compress(self, call):
        if self.is_counted is None:
            super().compress(call)
            return
        with torch.no_grad():
            self.policy.on_repetition(call.query, self.is_counted.to(call.query.device), self._view())

    def _commit(self, is_final):
        if not self._waits:
            super()._commit(is_final)

    def take_back(self, tokens_seen: int) -> None:
        """Forget rows that came after so many tokens, none of which has been packed."""
        n = self.tokens_seen - tokens_seen
        self.store.dense.truncate(self.store.dense.n_tokens - n)
        self.tokens_seen, self.is_counted = tokens_seen, None

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
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    request = input_ids[:, :0] if request is None else request.view(1, -1).to(input_ids).expand(len(input_ids), -1)
    asks = torch.ones_like(request)
    for start in range(first, n_seen, policy.chunk):
        part = slice(max(start - LEAD, 0), min(start + policy.chunk, n_seen))
        is_counted = torch.cat([asks == 0, mask[:, part] != 0], 1)
        fed = torch.cat([request, input_ids[:, part]], 1)
        options = {}
        if attention_mask is not None:
            whole = torch.cat([mask, asks, mask[:, part]], 1)
            positions = (whole.cumsum(-1) - 1).clamp(min=0)[:, n_seen:]
            options = {"attention_mask": whole, "position_ids": positions}
        theirs = [(layer, copy.deepcopy(vars(layer))) for layer in cache.layers if layer not in ours]
        try:
            for layer in ours:
                layer.is_counted = is_counted
            decoder(fed, **cache_argument(cache), use_cache=True, **options)
        finally:
            for layer in ours:
                layer.take_back(n_seen)
            for layer, before in theirs:
                vars(layer).update(before)
    scored = [(layer.store.state("score"), layer.store.positions, layer.store.n_fixed) for layer in ours]
    for layer, kept in zip(ours, ours[0].policy.select_in_layers(scored, n_seen), strict=True):
        layer.end_pass(kept)
