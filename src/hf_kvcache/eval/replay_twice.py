"""Texts that a cache reads twice (KVzip), out of a recording: of the dense prefill, and of what repeated it."""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_kvcache.compat import cache_argument, given_cache
from hf_kvcache.eval.replay import Handed, Prefill, first_tokens, hand_on, overhear, replay
from hf_kvcache.eval.texts import Texts
from hf_kvcache.long_prompts import prefill as read_twice
from hf_kvcache.second_pass import TwiceReadLayer


class Recorded:
    """Stands for a decoder that has read these texts before: caches are handed the same without a forward pass.

    Until a policy has the second pass behind it, its cache is dense, so the rows and queries of that pass are the same
    for all of them, too, and so is what a policy of one kind says of a row; what has not been fed yet is read once.

    Args:
        model: causal language model in evaluation mode.
        recorded: the prefill of `texts`.
        texts: what is read.
    """

    def __init__(self, model, recorded: Prefill, texts: Texts):
        self._decoder, self._recorded, self._texts = model.base_model, recorded, texts
        self._first: Prefill | None = None
        self._later: dict[bytes, list[Handed]] = {}
        self._weights: dict[tuple, dict[int, torch.Tensor]] = {}

    def fill(self, cache) -> torch.Tensor:
        """Let an empty cache under a policy that `reads_twice` take all tokens but the last, and compress them.

        Returns:
            The last token `[B, 1]`, which is still to be fed.
        """
        ids = self._texts.ids
        # in one piece: until the second pass is over nothing is evicted
        read_twice(self, ids, cache, attention_mask=self._texts.mask, chunk=ids.shape[1])
        return ids[:, -1:]

    def __call__(self, fed: torch.Tensor, *, use_cache: bool = True, **options) -> None:
        cache = given_cache(options)
        if cache.get_seq_length() == 0:
            if self._first is None:
                self._first = first_tokens(self._recorded, fed.shape[1])
            replay(self._first, cache)
            return
        key = b"".join(x.cpu().numpy().tobytes() for x in (fed, options.get("attention_mask")) if x is not None)
        if key not in self._later:
            rest = {name: x for name, x in options.items() if x is not cache}
            self._later[key], _ = overhear(
                self._first, lambda dense: self._decoder(fed, **cache_argument(dense), use_cache=True, **rest)
            )
        weights = self._weights.setdefault((key, type(cache.policy)), {})
        for layer in cache.layers:
            if isinstance(layer, TwiceReadLayer):
                layer.repeated = replace(layer.repeated, weights=weights)
        hand_on(self._later[key], cache)
