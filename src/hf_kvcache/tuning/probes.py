"""Texts that a model has read, and what it predicted of what follows: asked again of compressed caches.

A probe is a context, which is read once, and what comes after it, fed in one forward pass through the cache. Of prose
all predictions count, of needles those of the answers, which were not asked for when the context was compressed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import log_softmax, nll_loss

from hf_kvcache.cache import KVCache
from hf_kvcache.compat import cache_argument
from hf_kvcache.eval.asking import feed
from hf_kvcache.eval.prompts import Prompter
from hf_kvcache.eval.reading import finish
from hf_kvcache.eval.replay import NotReplayed, Prefill, check_replay, hand_on_layer, record, replay
from hf_kvcache.eval.replay_twice import Recorded
from hf_kvcache.eval.tasks import TASKS
from hf_kvcache.eval.texts import Texts
from hf_kvcache.layer import KVLayer
from hf_kvcache.long_prompts import begin, reads_twice
from hf_kvcache.tuning.follow import Rows

NEEDLES = ("niah_single_2", "niah_multikey_1")
N_QUESTIONS = 2
MOST_CHARACTERS = 12  # of a token of prose


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


def prose_texts(tokenizer, documents: Sequence[str], n_context: int, n_next: int, n: int) -> list[Text]:
    """Pieces of documents, as many of each as of another, and spread over them.

    Raises:
        ValueError: some piece is shorter than that.
    """
    found = []
    for i in range(n):
        # of few documents several pieces each, of many some that are evenly spread
        which, piece = i % len(documents), i // len(documents)
        if n < len(documents):
            which = i * len(documents) // n
        per_document = -(-n // len(documents))
        document, n_tokens = documents[which], n_context + n_next
        start = len(document) * piece // per_document
        # characters of more tokens than are taken, without the word that the cut goes through
        cut = document[start : start + MOST_CHARACTERS * n_tokens]
        cut = cut if start == 0 else cut.partition(" ")[2]
        ids = tokenizer(cut, add_special_tokens=False)["input_ids"]
        if len(ids) < n_tokens:
            raise ValueError(
                f"a piece of text has {len(ids)} tokens, and {n_tokens} are read; give longer texts, fewer pieces or a "
                "shorter context"
            )
        found.append(Text("text", ids[:n_context], ids[n_context:n_tokens], list(range(n_next - 1))))
    return found


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

    Attributes:
        counts_bytes: whether the bytes of caches are those of this text.
        prefill: what attention was called with, or None where a model cannot be listened to (`why_not` says why).
        expected: log-probabilities of the dense model at the places that count, `[n, vocab]`.
    """

    why_not = ""

    def __init__(self, model, text: Text):
        self.model, self.text = model, text
        self.counts_bytes = text.kind == "text"
        self.prefill: Prefill | None = None
        self._texts, self._recorded = Texts.of([text.context], model.device), None
        try:
            self.prefill = record(model, self._texts)
        except NotReplayed as error:
            # every cache then reads for itself
            self.why_not = str(error)
        self.expected = log_softmax(self._logits(self.filled(KVCache(config=model.config))), -1)

    @property
    def rows(self) -> list[Rows]:
        """Those of the context, dense, of every layer."""
        return [Rows(handed.k, handed.v) for handed in self.prefill.layers]

    @property
    def nbytes(self) -> int:
        """Bytes of a dense cache."""
        return sum(rows.nbytes for rows in self.rows)

    @property
    def dense(self) -> Score:
        """That of the dense cache."""
        hits = (self.expected.argmax(-1) == self._targets).float().mean().item()
        return Score(0.0, nll_loss(self.expected, self._targets).item(), hits)

    @property
    def _targets(self) -> torch.Tensor:
        follow = self.text.follow
        return torch.tensor([follow[i + 1] for i in self.text.scored], device=self.expected.device)

    def filled(self, cache):
        """A cache that has read the context and compressed it."""
        try:
            if self.prefill is None:
                raise NotReplayed
            check_replay(cache, twice=True)
            if reads_twice(cache):
                feed(self.model, cache, self._second_pass.fill(cache))
            else:
                replay(self.prefill, cache)
        except NotReplayed:
            read(self.model, cache, self.text.context)
        finish(cache)
        return cache

    @property
    def _second_pass(self) -> Recorded:
        """What stands for the model where the context is read twice."""
        if self._recorded is None:
            self._recorded = Recorded(self.model, self.prefill, self._texts)
        return self._recorded

    def score(self, cache) -> Score:
        """Feed what follows through a filled cache, which has seen it afterwards."""
        found = log_softmax(self._logits(cache), -1)
        kl = (self.expected.exp() * (self.expected - found)).sum(-1).mean().item()
        hits = (found.argmax(-1) == self._targets).float().mean().item()
        # rounding can take a sum of zeros below zero
        return Score(max(kl, 0.0), nll_loss(found, self._targets).item(), hits)

    @torch.no_grad()
    def filled_layer(self, cache: KVCache, layer_idx: int) -> KVLayer:
        """One layer of an empty cache that has read the context and compressed it; the others stay empty."""
        hand_on_layer(self.prefill.layers[layer_idx], cache, layer_idx)
        layer = cache.layers[layer_idx]
        assert isinstance(layer, KVLayer)
        layer.finish()
        return layer

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


def read_all(model, texts: Sequence[Text], advance: Callable[[str], None] = lambda stage: None) -> list[Probe]:
    """Read one text after the other."""
    found = []
    for i, text in enumerate(texts):
        advance(f"reading, text {i + 1} of {len(texts)}")
        found.append(Probe(model, text))
    return found
