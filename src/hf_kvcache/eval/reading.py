"""One text that many caches read."""

from __future__ import annotations

import torch

from hf_kvcache.eval.asking import feed
from hf_kvcache.layer import KVLayer


class Reading:
    """A text, and what a model made of it.

    Args:
        model: causal language model in evaluation mode.
        ids: the text.
        settings: of the evaluation.
    """

    def __init__(self, model, ids: list[int], settings):
        self.model, self.ids, self.settings = model, ids, settings

    def fill(self, spec) -> tuple[object, torch.Tensor, str]:
        """A new cache that has read and compressed the text, the logits `[vocab]` after it, and how it was filled."""
        cache = spec.build(self.model.config)
        logits = feed(self.model, cache, self.ids)
        finish(cache)
        return cache, logits, "direct"


def finish(cache) -> None:
    """Let layers that wait for what follows compress what they have: nothing more of this text will come."""
    for layer in cache.layers:
        if isinstance(layer, KVLayer):
            layer.finish()
