"""A batch of instances behind one cache after the other: read, compressed, asked and scored."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from hf_kvcache.eval.asking import decode, feed
from hf_kvcache.eval.batches import Batch
from hf_kvcache.eval.compare import prepare
from hf_kvcache.eval.lines import Lines
from hf_kvcache.eval.memory import cache_nbytes
from hf_kvcache.eval.reading import Reading
from hf_kvcache.eval.specs import CacheSpec
from hf_kvcache.eval.texts import Texts


class Questioning:
    """The questions of one batch.

    Args:
        model, tokenizer: a causal language model in evaluation mode.
        stops: tokens that end an answer.
        lines: takes an answer as soon as there is one.
        settings: of the evaluation.
        batch: what is asked.
    """

    def __init__(self, model, tokenizer, stops: set[int], lines: Lines, settings, batch: Batch):
        self.model, self.tokenizer, self.stops = model, tokenizer, stops
        self.lines, self.settings, self.batch = lines, settings, batch

    def run(self, settings: tuple[str, ...], specs: tuple[CacheSpec, ...]) -> Iterator[tuple[str, int]]:
        """Ask what is missing; yields a description and a number of answers before each cache.

        One text after the other is read for all caches, so that no more are remembered at a time than what a question
        follows.
        """
        missing = self.batch.missing
        for reading, in_settings, questions in self._readings(settings):
            for spec in specs:
                found = {s: [q for q in missing.get((s, spec.text), ()) if q in questions] for s in in_settings}
                if any(found.values()):
                    yield self._stage(spec, in_settings), sum(map(len, found.values())) * len(self.batch.rows)
                    self._ask(reading, spec, found)

    def _readings(self, settings: tuple[str, ...]) -> Iterator[tuple[Reading, list[str], list[int]]]:
        """What is read before a cache compresses, in which settings, and the questions that are asked of it."""
        contexts = Texts.of([row.prompt.context for row in self.batch.rows], self.model.device)
        begun, every = Reading(self.model, contexts, self.settings), list(range(len(self.batch.n_new)))
        if later := [setting for setting in settings if setting != "known"]:
            yield begun, later, every
            begun.let_go()
        if "known" in settings:
            for q in every:
                whole = contexts.followed_by(self._tokens([row.prompt.questions[q] for row in self.batch.rows]))
                yield Reading(self.model, whole, self.settings, begun), ["known"], [q]

    def _tokens(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self.model.device)

    def _ask(self, reading: Reading, spec: CacheSpec, asked: dict[str, list[int]]) -> None:
        """Compress a text into a cache and ask; a failure ends this setting for this cache, not the evaluation."""
        prepare(self.model, spec, self.settings)
        try:
            cache, logits, filled = reading.fill(spec)
            nbytes = cache_nbytes(cache) // len(self.batch.rows)
            known = {"n_read": reading.texts.lengths, "nbytes": nbytes, "filled": filled}
        except Exception as error:
            self._fail(spec, asked, error)
            return
        n_padding = reading.texts.n_padding
        # a conversation is one use of a cache, and so is a question; the last one may change what was read
        uses = [(s, q) for s, questions in asked.items() for q in (questions[:1] if s == "turns" else questions)]
        failed = set()
        for use in uses:
            setting, q = use
            if setting in failed:
                continue
            try:
                own = cache if use == uses[-1] else fork(cache, reading, spec)
                if setting == "turns":
                    self._take_turns(spec, own, known)
                elif setting == "known":
                    self._answer(setting, spec, q, own, logits, n_padding, n_asked=0, **known)
                else:
                    ids = self._tokens([row.prompt.questions[q] for row in self.batch.rows])
                    said = feed(self.model, own, ids, n_padding)
                    self._answer(setting, spec, q, own, said, n_padding, n_asked=ids.shape[1], **known)
            except Exception as error:
                self._fail(spec, {setting: asked[setting]}, error)
                failed.add(setting)

    def _fail(self, spec: CacheSpec, asked: dict[str, list[int]], error: Exception) -> None:
        for setting, questions in asked.items():
            for q in questions:
                for line in self.batch.lines(setting, spec.text, q, error=f"{type(error).__name__}: {error}"):
                    if not self.lines.has(line.key):
                        self.lines.add(line)

    def _take_turns(self, spec: CacheSpec, cache, known: dict) -> None:
        """All questions of one instance in a row: each stands after what the model itself has said before."""
        (row,), left, n_asked = self.batch.rows, [], 0
        for q, n_new in enumerate(self.batch.n_new):
            ids = row.prompt.turns[q - 1] if q else row.prompt.questions[0]
            n_asked += len(ids)
            logits = feed(self.model, cache, self._tokens([left + ids]))
            (said,) = self._answer("turns", spec, q, cache, logits, None, n_asked=n_asked, **known)
            # an answer that was cut off ends in a token that the cache has not seen
            left = said[n_new - 1 :]

    def _answer(self, setting: str, spec: CacheSpec, q: int, cache, logits, n_padding, **known) -> list[list[int]]:
        said = decode(self.model, cache, logits, self.stops, self.batch.n_new[q], n_padding)
        answers = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]
        asked = [row.instance.questions[q] for row in self.batch.rows]
        scores = [float(self.batch.task.score(*pair)) for pair in zip(answers, asked, strict=True)]
        found = dict(answer=answers, n_answer=[len(tokens) for tokens in said], score=scores)
        for line in self.batch.lines(setting, spec.text, q, **found, **known):
            self.lines.add(line)
        return said

    def _stage(self, spec: CacheSpec, settings: list[str]) -> str:
        numbers = [row.number + 1 for row in self.batch.rows]
        which = f"{numbers[0]}" if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"
        return f"{self.batch.task.name} · {self.batch.length:,} · {which} · {' + '.join(settings)} · {spec.text}"


def fork(cache, reading: Reading, spec: CacheSpec):
    """A copy of a cache that has read a text, to be changed."""
    try:
        return copy.deepcopy(cache)
    except RuntimeError:
        # tensors of optimum-quanto cannot be copied: the text is compressed once more
        return reading.fill(spec)[0]
