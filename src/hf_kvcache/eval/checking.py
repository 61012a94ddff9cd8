"""One cache beside the dense one, text by text: what a model predicts, finds and says behind it.

A text is read once and compressed without knowing what comes: prose is gone on with through the compressed cache, then
the model goes on by itself; needles are asked for. transformers' DynamicCache does the same before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix

import torch
from torch.nn.functional import log_softmax, nll_loss

from hf_kvcache.compat import cache_argument
from hf_kvcache.dmc import retrofits
from hf_kvcache.eval.asking import decode, feed, stops_of
from hf_kvcache.eval.check_texts import Asked, NeedleText
from hf_kvcache.eval.compare import prepare
from hf_kvcache.eval.continuing import STEP
from hf_kvcache.eval.memory import cache_nbytes
from hf_kvcache.eval.questioning import fork
from hf_kvcache.eval.reading import Reading
from hf_kvcache.eval.specs import CacheSpec, parse
from hf_kvcache.eval.tasks.scoring import string_match_all
from hf_kvcache.eval.texts import Texts
from hf_kvcache.eval.windows import in_steps

N_GRAM = 4


@dataclass(frozen=True)
class Deviation:
    """How far predictions are from those of the dense cache.

    Attributes:
        kl: of the dense model's from them, nats, mean over the tokens; None where they are not all finite.
        loss, dense_loss: negative log-likelihood of the text, nats per token; None as `kl`.
        same: share of the tokens whose first choice is the dense model's.
        is_finite: whether they are finite wherever the dense model's are.
    """

    kl: float | None
    loss: float | None
    dense_loss: float
    same: float
    is_finite: bool


@dataclass(frozen=True)
class Piece:
    """A piece of prose.

    Attributes:
        deviation: of the predictions of what follows.
        repeats, dense_repeats: share of the sequences of four tokens that the model, going on greedily, says again;
            None where it was not let.
        agreed: tokens that it says before the first that the dense model does not say; None as `repeats`.
        nbytes, dense_nbytes: bytes of the caches once they had compressed.
        nbytes_later, dense_nbytes_later: after all that was fed and said.
    """

    deviation: Deviation
    repeats: float | None
    dense_repeats: float | None
    agreed: int | None
    nbytes: int
    dense_nbytes: int
    nbytes_later: int
    dense_nbytes_later: int


@dataclass(frozen=True)
class Found:
    """A text with needles.

    Attributes:
        deviation: of the predictions of the right answers, all questions together.
        score, dense_score: share of the questions that are answered.
        n: questions.
    """

    deviation: Deviation
    score: float
    dense_score: float
    n: int


class DenseIsNotFinite(ValueError):
    """The dense model itself predicts NaN."""


class Check:
    """A model behind one cache and behind the dense one.

    Args:
        model, tokenizer: a causal language model in evaluation mode.
        spec: the cache.
        settings: of an evaluation (`running.Settings`).
        advance: called with a description before every text.
    """

    def __init__(
        self, model, tokenizer, spec: CacheSpec, settings, advance: Callable[[str], None] = lambda stage: None
    ):
        self.model, self.tokenizer, self.spec, self.settings = model, tokenizer, spec, settings
        self.dense, self.advance = parse("dynamic"), advance

    def go_on(self, windows: Sequence[list[int]], n_context: int, n_new: int) -> list[Piece]:
        """Go on with pieces of prose.

        Args:
            windows: token ids; the first `n_context` of each are read and compressed, the last one is predicted only.
            n_new: tokens that the model then says by itself; 0 for none.
        """
        return self._all("prose", windows, lambda window: self._piece(window, n_context, n_new))

    def ask(self, texts: Sequence[NeedleText]) -> list[Found]:
        """Ask for needles."""
        return self._all("needles", texts, self._found)

    def _all(self, name: str, texts: Sequence, one: Callable) -> list:
        found = []
        try:
            for i, text in enumerate(texts):
                self.advance(f"{name}, text {i + 1} of {len(texts)}")
                found.append(one(text))
        finally:
            for child in retrofits(self.model).values():
                child.compresses = True
        return found

    def _piece(self, ids: list[int], n_context: int, n_new: int) -> Piece:
        window = torch.tensor([ids], device=self.model.device)
        reading = Reading(self.model, Texts(window[:, :n_context]), self.settings)
        dense, own = (self._through(reading, spec, window, n_new) for spec in (self.dense, self.spec))
        targets = window[0, n_context + 1 :]
        found = deviation(dense.logits, own.logits, targets, is_finite=own.ends_finite)
        return Piece(
            found,
            _repeats(own.said),
            _repeats(dense.said),
            len(commonprefix([own.said, dense.said])) if n_new else None,
            own.nbytes,
            dense.nbytes,
            own.nbytes_later,
            dense.nbytes_later,
        )

    @torch.no_grad()
    def _through(self, reading: Reading, spec: CacheSpec, window: torch.Tensor, n_new: int) -> _Through:
        cache = self._filled(reading, spec)
        nbytes, n_context = cache_nbytes(cache), reading.texts.ids.shape[1]
        steps = [self._logits(fed, cache) for fed, _ in in_steps(window, n_context, STEP)]
        logits, said, ends_finite = torch.cat(steps), [], True
        if n_new:
            (said,) = decode(self.model, cache, logits[-1:], set(), n_new)
            # what is not finite stays in the rows
            last = feed(self.model, cache, torch.tensor([said[-1:]], device=self.model.device))
            ends_finite = not last.isnan().any().item()
        return _Through(logits, said, nbytes, cache_nbytes(cache), ends_finite)

    def _found(self, text: NeedleText) -> Found:
        reading = Reading(self.model, Texts.of([text.context], self.model.device), self.settings)
        (expected, dense), (found, own) = (self._answers(reading, spec, text) for spec in (self.dense, self.spec))
        targets = torch.tensor([token for asked in text.asked for token in asked.said], device=self.model.device)
        n = len(text.asked)
        return Found(deviation(expected, found, targets), sum(own) / n, sum(dense) / n, n)

    def _answers(self, reading: Reading, spec: CacheSpec, text: NeedleText) -> tuple[torch.Tensor, list[float]]:
        """Logits `[n, vocab]` of the right answers, and the scores of those that are given."""
        cache = self._filled(reading, spec)
        stops, logits, scores = stops_of(self.model, self.tokenizer), [], []
        for asked in text.asked:
            logits.append(self._logits_of_answer(asked, fork(cache, reading, spec)))
            forked = fork(cache, reading, spec)
            ids = torch.tensor([asked.ids], device=self.model.device)
            (said,) = decode(self.model, forked, feed(self.model, forked, ids), stops, asked.n_new)
            answer = self.tokenizer.decode(said, skip_special_tokens=True)
            scores.append(string_match_all(answer, asked.question))
        return torch.cat(logits), scores

    @torch.no_grad()
    def _logits_of_answer(self, asked: Asked, cache) -> torch.Tensor:
        fed = torch.tensor([asked.ids + asked.said[:-1]], device=self.model.device)
        return self._logits(fed, cache)[-len(asked.said) :]

    def _filled(self, reading: Reading, spec: CacheSpec):
        prepare(self.model, spec, self.settings)
        return reading.fill(spec)[0]

    def _logits(self, fed: torch.Tensor, cache) -> torch.Tensor:
        return self.model(fed, **cache_argument(cache), use_cache=True).logits[0].float()


@dataclass(frozen=True)
class _Through:
    """What came of one piece of prose behind one cache."""

    logits: torch.Tensor
    said: list[int]
    nbytes: int
    nbytes_later: int
    ends_finite: bool


def deviation(expected: torch.Tensor, found: torch.Tensor, targets: torch.Tensor, is_finite: bool = True) -> Deviation:
    """Compare logits `[n, vocab]`.

    Args:
        expected: of the dense model.
        found: of the model behind a cache.
        targets: right tokens `[n]`.
        is_finite: whether all other logits behind the cache were finite.

    Raises:
        DenseIsNotFinite: logits of the dense model are NaN.
    """
    if expected.isnan().any():
        raise DenseIsNotFinite("the dense model itself predicts NaN on this text; try another --dtype")
    same = (expected.argmax(-1) == found.argmax(-1)).float().mean().item()
    # one logit that is NaN or infinite makes its whole row NaN
    expected, found = log_softmax(expected, -1), log_softmax(found, -1)
    is_finite &= bool((found.isfinite() | ~expected.isfinite()).all())
    dense_loss = nll_loss(expected, targets).item()
    if not is_finite:
        return Deviation(None, None, dense_loss, same, False)
    p = expected.exp()
    # tokens that the model rules out by a logit of -inf count for nothing
    kl = (p * (expected - found)).where(p > 0, 0).sum(-1).mean().item()
    # rounding can take a sum of zeros below zero
    return Deviation(max(kl, 0.0), nll_loss(found, targets).item(), dense_loss, same, True)


def _repeats(said: list[int]) -> float | None:
    """Share of the sequences of four tokens that have come before; None where nothing was said."""
    grams = [tuple(said[i : i + N_GRAM]) for i in range(len(said) - N_GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else (0.0 if said else None)
