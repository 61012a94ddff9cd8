"""One text that many caches read: once for all of them, where that makes no difference."""

from __future__ import annotations

import torch

from hf_kvcache.eval.asking import feed
from hf_kvcache.eval.compare import prepare
from hf_kvcache.eval.replay import NotReplayed, Prefill, check_replay, record, replay
from hf_kvcache.eval.specs import CacheSpec, parse
from hf_kvcache.layer import KVLayer
from hf_kvcache.long_prompts import begin


class Reading:
    """A text, and what a model made of it.

    Args:
        model: causal language model in evaluation mode.
        ids: the text.
        settings: of the evaluation.
    """

    def __init__(self, model, ids: list[int], settings):
        self.model, self.ids, self.settings = model, ids, settings
        self._prefill: Prefill | None = None
        # why there is none, where there is none
        self._reason = None if settings.replays else ""

    def fill(self, spec: CacheSpec) -> tuple[object, torch.Tensor, str]:
        """A new cache that has read and compressed the text, the logits `[vocab]` after it, and how it was filled.

        That is "replayed", or "direct" and, where a replay was asked for, why there was none.
        """
        cache = spec.build(self.model.config)
        try:
            prefill = self._prefill_for(spec, cache)
        except NotReplayed as error:
            filled = f"direct: {error}" if str(error) else "direct"
            fed = begin(self.model, torch.tensor([self.ids], device=self.model.device), cache)
            logits = feed(self.model, cache, fed[0].tolist())
        else:
            replay(prefill, cache)
            logits, filled = prefill.logits, "replayed"
        finish(cache)
        return cache, logits, filled

    def _prefill_for(self, spec: CacheSpec, cache) -> Prefill:
        if self._reason is not None:
            raise NotReplayed(self._reason)
        check_replay(cache)
        if self._prefill is None:
            prepare(self.model, parse("dense"), self.settings)
            try:
                self._prefill = record(self.model, self.ids)
            except Exception as error:
                # a model that computes with rows by itself finds none, and memory may not hold them: asked once
                said = f"{type(error).__name__}: {error}".splitlines()[0]
                is_known = isinstance(error, NotReplayed)
                self._reason = str(error) if is_known else f"this model cannot be recorded: {said}"
                raise NotReplayed(self._reason) from error
            finally:
                prepare(self.model, spec, self.settings)
        return self._prefill


def finish(cache) -> None:
    """Let layers that wait for what follows compress what they have: nothing more of this text will come."""
    for layer in cache.layers:
        if isinstance(layer, KVLayer):
            layer.finish()
