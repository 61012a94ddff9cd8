"""Texts that a model has read, and what it predicted of what follows: asked again of compressed caches.

A probe is a context, which is read once, and what comes after it, fed in one forward pass through the cache. Of prose
all predictions count, of needles those of the answers, which were not asked for when the context was compressed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import log_softmax, nll_loss

from hf_kvcache.cache import KVCache
from hf_kvcache.calibration.text import token_batches
from hf_kvcache.compat import cache_argument
from hf_kvcache.eval.prompts import Prompter
from hf_kvcache.eval.reading import finish
from hf_kvcache.eval.replay import NotReplayed, Prefill, check_replay, record, replay
from hf_kvcache.eval.tasks import TASKS
from hf_kvcache.long_prompts import begin

NEEDLES = ("niah_single_2", "niah_multikey_1")
N_QUESTIONS = 2


@dataclass(frozen=True)
class Text:
    """Token ids of a probe.

    Attributes:
        kind: "text" or "needle".
        context: what is read and compressed.
        follow: what is fed after it.
        scored: places in `follow` whose predictions of the next token count.
    """

    kind: str
    context: list[int]
    follow: list[int]
    scored: list[int]


@dataclass(frozen=True)
class Score:
    """How far predictions are from those of the dense cache, means over the predictions that count.

    Attributes:
        kl: divergence of the dense model's from them, nats per token.
        nll: negative log-likelihood of the text or the answers, nats per token.
        hits: share of the predictions whose first choice is the text or the answer.
    """

    kl: float
    nll: float
    hits: float


def prose_texts(ids: torch.Tensor, n_context: int, n_next: int, n: int) -> list[Text]:
    """Pieces of a text `[n_tokens]`, evenly spread, as many as fit side by side; raises ValueError if none does."""
    rows = [row[0].tolist() for row in token_batches(ids, n_context + n_next, n)]
    return [Text("text", row[:n_context], row[n_context:], list(range(n_next - 1))) for row in rows]


def needle_texts(tokenizer, n_context: int, n: int, seed: int = 0) -> list[Text]:
    """Needles in prose, and two questions each with their answers, one after the other.

    Raises:
        ValueError: the context is too short for them.
    """
    prompter = Prompter(tokenizer)
    return [_needle(prompter, n_context, i, seed) for i in range(n)]


def _needle(prompter: Prompter, n_context: int, i: int, seed: int) -> Text:
    task = TASKS[NEEDLES[i % len(NEEDLES)]]
    rng = np.random.default_rng([seed, i])
    instance = task.build(prompter.count, n_context - prompter.n_added(), rng, n_questions=N_QUESTIONS)
    prompt = prompter.prompt(instance)
    follow, scored = [], []
    for q, question in enumerate(instance.questions):
        asked = prompt.questions[0] if q == 0 else prompt.turns[q - 1]
        said = prompter.tokenizer(" " + ", ".join(question.answers), add_special_tokens=False)["input_ids"]
        follow += asked
        scored += range(len(follow) - 1, len(follow) - 1 + len(said))
        follow += said
    return Text("needle", prompt.context, follow, scored)


class Probe:
    """A text that has been read behind a dense cache.

    Args:
        model: causal language model in evaluation mode.
        text: what is read and asked.
    """

    def __init__(self, model, text: Text):
        self.model, self.text = model, text
        self.prefill: Prefill | None = None
        try:
            self.prefill = record(model, text.context)
        except NotReplayed:
            # some models cannot be listened to; every cache then reads for itself
            pass
        self.dense = self.filled(KVCache())
        self._expected = log_softmax(self._logits(self.dense), -1)
        self._rewind()

    @property
    def expected_nll(self) -> float:
        """That of the dense model."""
        return nll_loss(self._expected, self._targets).item()

    @property
    def _targets(self) -> torch.Tensor:
        follow = self.text.follow
        return torch.tensor([follow[i + 1] for i in self.text.scored], device=self._expected.device)

    def filled(self, cache):
        """A cache that has read the context and compressed it."""
        try:
            if self.prefill is None:
                raise NotReplayed
            check_replay(cache)
            replay(self.prefill, cache)
        except NotReplayed:
            read(self.model, cache, self.text.context)
        finish(cache)
        return cache

    def score(self, cache) -> Score:
        """Feed what follows through a filled cache, which has seen it afterwards."""
        found = log_softmax(self._logits(cache), -1)
        kl = (self._expected.exp() * (self._expected - found)).sum(-1).mean().item()
        hits = (found.argmax(-1) == self._targets).float().mean().item()
        # rounding can take a sum of zeros below zero
        return Score(max(kl, 0.0), nll_loss(found, self._targets).item(), hits)

    def score_layers(self, cache: KVCache, layers: dict[int, object]) -> Score:
        """That of an empty cache with these filled layers, and dense ones elsewhere."""
        cache.layers = [layers.get(i, layer) for i, layer in enumerate(self.dense.layers)]
        try:
            return self.score(cache)
        finally:
            self._rewind()

    def _rewind(self) -> None:
        """Let the dense cache forget what was fed after the context."""
        surplus = self.dense.get_seq_length() - len(self.text.context)
        for layer in self.dense.layers:
            if (n := layer.get_seq_length() - len(self.text.context)) > 0:
                layer.crop(-n) if surplus >= 0 else None

    @torch.no_grad()
    def _logits(self, cache) -> torch.Tensor:
        fed = torch.tensor([self.text.follow], device=self.model.device)
        logits = self.model(fed, **cache_argument(cache), use_cache=True).logits[0]
        return logits[self.text.scored].float()


@torch.no_grad()
def read(model, cache, ids: list[int]) -> None:
    """Let a model read a context into a cache."""
    fed = begin(model, torch.tensor([ids], device=model.device), cache)
    model(fed, **cache_argument(cache), use_cache=True, logits_to_keep=1)


def copied(layers: dict[int, object]) -> dict[int, object]:
    """Layers that can be fed while the others stay as they are."""
    return {i: copy.deepcopy(layer) for i, layer in layers.items()}


def probes_of(model, texts: list[Text], advance: Callable[[str], None] = lambda stage: None) -> Iterator[Probe]:
    """Read one text after the other."""
    for i, text in enumerate(texts):
        advance(f"reading {text.kind} {i + 1} of {len(texts)}")
        yield Probe(model, text)
