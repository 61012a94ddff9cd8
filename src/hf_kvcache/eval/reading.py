"""Texts that many caches read: once for all of them, where that makes no difference."""

from __future__ import annotations

import torch

from hf_kvcache.eval.asking import feed
from hf_kvcache.eval.compare import prepare
from hf_kvcache.eval.replay import NotReplayed, Prefill, check_replay, record, record_on, replay
from hf_kvcache.eval.replay_twice import Recorded
from hf_kvcache.eval.specs import CacheSpec, parse
from hf_kvcache.eval.texts import Texts
from hf_kvcache.layer import KVLayer
from hf_kvcache.long_prompts import begin, reads_twice


class Reading:
    """Texts that are read together, and what a model made of them.

    Args:
        model: causal language model in evaluation mode.
        texts: what is read.
        settings: of the evaluation.
        before: a reading of what `texts` begins with; if it was recorded, only the rest is read.
    """

    def __init__(self, model, texts: Texts, settings, before: Reading | None = None):
        self.model, self.texts, self.settings, self._before = model, texts, settings, before
        self._prefill: Prefill | None = None
        self._recorded: Recorded | None = None
        # why there is none, where there is none
        self._reason = None if settings.replays else ""

    def fill(self, spec: CacheSpec) -> tuple[object, torch.Tensor, str]:
        """A new cache that has read and compressed the texts, the logits `[B, vocab]` after them, and how it was made.

        That is "replayed", or "direct" and, where a replay was asked for, why there was none.
        """
        cache, texts = spec.build(self.model.config), self.texts
        try:
            prefill = self._prefill_for(spec, cache)
        except NotReplayed as error:
            filled = f"direct: {error}" if str(error) else "direct"
            rest = begin(self.model, texts.ids, cache, texts.mask)
            logits = feed(self.model, cache, rest, texts.n_padding)
        else:
            logits, filled = self._replay(prefill, cache), "replayed"
        finish(cache)
        return cache, logits, filled

    def let_go(self) -> None:
        """Forget what only caches that read twice need: it is as large as all the rest."""
        self._recorded = None

    def _replay(self, prefill: Prefill, cache) -> torch.Tensor:
        if not reads_twice(cache):
            replay(prefill, cache)
            return prefill.logits
        if self._recorded is None:
            self._recorded = Recorded(self.model, prefill, self.texts)
        return feed(self.model, cache, self._recorded.fill(cache), self.texts.n_padding)

    def _prefill_for(self, spec: CacheSpec, cache) -> Prefill:
        if self._reason is not None:
            raise NotReplayed(self._reason)
        check_replay(cache, twice=True)
        if self._prefill is None:
            prepare(self.model, parse("dense"), self.settings)
            try:
                self._prefill = self._record()
            except Exception as error:
                # a model that computes with rows by itself finds none, and memory may not hold them: asked once
                said = f"{type(error).__name__}: {error}".splitlines()[0]
                is_known = isinstance(error, NotReplayed)
                self._reason = str(error) if is_known else f"this model cannot be recorded: {said}"
                raise NotReplayed(self._reason) from error
            finally:
                prepare(self.model, spec, self.settings)
        return self._prefill

    def _record(self) -> Prefill:
        begun = self._before and self._before._prefill
        if begun:
            rest = self.texts.ids[:, self._before.texts.ids.shape[1] :]
            try:
                return record_on(self.model, begun, rest, self.texts.n_padding)
            except NotReplayed:
                # all of it in one pass, then
                pass
        return record(self.model, self.texts)


def finish(cache) -> None:
    """Let layers that wait for what follows compress what they have: nothing more of these texts will come."""
    for layer in cache.layers:
        if isinstance(layer, KVLayer):
            layer.finish()
