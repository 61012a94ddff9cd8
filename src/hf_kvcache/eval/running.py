"""Tasks asked of one model behind many caches: what is read, compressed, asked and scored, in which order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from zlib import crc32

import numpy as np

from hf_kvcache.dmc import retrofits
from hf_kvcache.eval.asking import decode, feed, stops_of
from hf_kvcache.eval.compare import prepare
from hf_kvcache.eval.lines import Line, Lines
from hf_kvcache.eval.memory import cache_nbytes
from hf_kvcache.eval.prompts import Prompter
from hf_kvcache.eval.reading import Reading
from hf_kvcache.eval.specs import CacheSpec
from hf_kvcache.eval.tasks.instances import Instance, Task

SETTINGS = {
    "known": "instruction, context and question are read together, then the cache compresses, then the answer comes",
    "unknown": "instruction and context are read and compressed once, each question is asked of a copy of that cache",
    "turns": "instruction and context are read and compressed, then the questions follow each other in that cache",
}


@dataclass(frozen=True)
class Settings:
    """What every answer depends on beside its task, length, instance, setting and cache.

    Attributes:
        n_questions: about every context.
        seed: of the instances.
        uses_template: whether prompts are made with the tokenizer's chat template, if it has one.
        attention: implementation under our caches; transformers' own run on sdpa, or on eager where that is named.
        replays: whether one dense prefill serves all caches that attend to it exactly.
    """

    n_questions: int = 1
    seed: int = 0
    uses_template: bool = True
    attention: str = "hf_kvcache"
    replays: bool = True


@dataclass(frozen=True)
class Plan:
    """What is asked of which caches.

    Attributes:
        tasks: to ask.
        lengths: of prompts, in tokens, at most.
        n_instances: of every task and length.
        settings: names of `SETTINGS`.
        specs: caches, the baseline first.
    """

    tasks: tuple[Task, ...]
    lengths: tuple[int, ...]
    n_instances: int
    settings: tuple[str, ...]
    specs: tuple[CacheSpec, ...]

    def instances(self) -> Iterator[tuple[Task, int, int]]:
        """Task, length and number of every instance: the first of all, then the second, so that all rows fill alike."""
        for i, task, length in product(range(self.n_instances), self.tasks, self.lengths):
            yield task, length, i

    def n_lines(self, settings: Settings) -> int:
        """Answers of the whole run."""
        n_rows = len(self.tasks) * len(self.lengths) * len(self.settings) * len(self.specs)
        return n_rows * self.n_instances * settings.n_questions


def build_instance(task: Task, prompter: Prompter, length: int, i: int, settings: Settings) -> Instance:
    """Instance `i` of a task, whose prompt has at most `length` tokens or few more; the same for all caches.

    Raises:
        ValueError: the task cannot be as short as that, or does not ask that many questions.
    """
    rng = np.random.default_rng([settings.seed, crc32(task.name.encode()), length, i])
    asked = {} if settings.n_questions == 1 else {"n_questions": settings.n_questions}
    if task.n_instances is not None:
        asked["i"] = i
    try:
        instance = task.build(prompter.count, length - prompter.n_added(), rng, **asked)
    except TypeError as error:
        if "n_questions" not in str(error):
            raise
        raise ValueError(f"{task.name} asks one question about a context, not {settings.n_questions}") from error
    if len(instance.questions) != settings.n_questions:
        n = len(instance.questions)
        raise ValueError(f"{task.name} asks {n} question{'s' * (n > 1)} about a context, not {settings.n_questions}")
    return instance


def most_tokens(plan: Plan, prompter: Prompter, settings: Settings) -> int:
    """Tokens that the first instances of a plan take, answers included."""
    found = 0
    for task, length in product(plan.tasks, plan.lengths):
        instance = build_instance(task, prompter, length, 0, settings)
        prompt, n_new = prompter.prompt(instance), [q.max_new_tokens for q in instance.questions]
        for setting in plan.settings:
            n_said = sum(n_new) if setting == "turns" else max(n_new)
            found = max(found, prompt.n_tokens(setting) + n_said)
    return found


def evaluate(
    model,
    tokenizer,
    plan: Plan,
    settings: Settings,
    lines: Lines,
    advance: Callable[[str, int], None] = lambda stage, n_lines: None,
) -> None:
    """Ask all that has no line yet.

    Args:
        model, tokenizer: a causal language model in evaluation mode.
        plan: what is asked.
        lines: takes an answer as soon as there is one.
        advance: called with a description and a number of answers, before they are asked for or where they are there.
    """
    prompter, stops = Prompter(tokenizer, settings.uses_template), stops_of(model, tokenizer)
    try:
        for task, length, i in plan.instances():
            asking = _Asking(model, tokenizer, stops, task, length, i, lines, settings)
            missing = {(s, spec.text): asking.missing(s, spec) for s in plan.settings for spec in plan.specs}
            n_missing = sum(map(len, missing.values()))
            n_known = len(missing) * settings.n_questions - n_missing
            advance("", n_known)
            if n_missing:
                asking.begin(build_instance(task, prompter, length, i, settings), prompter)
                for stage, n in asking.run(plan, missing):
                    advance(stage, n)
    finally:
        for child in retrofits(model).values():
            child.compresses = True


class _Asking:
    """The questions of one instance."""

    def __init__(self, model, tokenizer, stops, task: Task, length: int, i: int, lines: Lines, settings: Settings):
        self.model, self.tokenizer, self.stops = model, tokenizer, stops
        self.task, self.length, self.i, self.lines, self.settings = task, length, i, lines, settings

    def begin(self, instance: Instance, prompter: Prompter) -> None:
        self.instance, self.prompt = instance, prompter.prompt(instance)

    def key(self, setting: str, spec: CacheSpec, question: int) -> tuple:
        return self.task.name, self.length, self.i, setting, spec.text, question

    def missing(self, setting: str, spec: CacheSpec) -> list[int]:
        """Questions without an answer."""
        return [q for q in range(self.settings.n_questions) if not self.lines.has(self.key(setting, spec, q))]

    def run(self, plan: Plan, missing: dict) -> Iterator[tuple[str, int]]:
        """Ask what is missing; yields a description and a number of answers before each cache.

        One text after the other is read for all caches, so that no more than one is remembered at a time.
        """
        for ids, settings, questions in self._texts(plan.settings):
            reading = Reading(self.model, ids, self.settings)
            for spec in plan.specs:
                asked = {s: [q for q in missing[s, spec.text] if q in questions] for s in settings}
                if any(asked.values()):
                    yield self._stage(spec, settings), sum(map(len, asked.values()))
                    self._ask(reading, spec, asked)

    def _texts(self, settings: tuple[str, ...]) -> Iterator[tuple[list[int], list[str], list[int]]]:
        """What is read before a cache compresses, in which settings, and the questions that are asked of it."""
        prompt, every = self.prompt, list(range(self.settings.n_questions))
        if "known" in settings:
            for q in every:
                yield prompt.context + prompt.questions[q], ["known"], [q]
        if later := [setting for setting in settings if setting != "known"]:
            yield prompt.context, later, every

    def _ask(self, reading: Reading, spec: CacheSpec, asked: dict[str, list[int]]) -> None:
        """Compress a text into a cache and ask; a failure ends this setting for this cache, not the evaluation."""
        prepare(self.model, spec, self.settings)
        try:
            cache, logits, filled = reading.fill(spec)
            known = {"n_read": len(reading.ids), "nbytes": cache_nbytes(cache), "filled": filled}
        except Exception as error:
            self._fail(spec, asked, error)
            return
        for setting, questions in asked.items():
            try:
                if setting == "turns" and questions:
                    self._take_turns(spec, cache, known)
                for q in questions if setting == "known" else ():
                    self._answer(setting, spec, q, cache, logits, known, 0)
                for q in questions if setting == "unknown" else ():
                    ids, fork = self.prompt.questions[q], _fork(cache, reading, spec)
                    self._answer(setting, spec, q, fork, feed(self.model, fork, ids), known, len(ids))
            except Exception as error:
                self._fail(spec, {setting: questions}, error)

    def _fail(self, spec: CacheSpec, asked: dict[str, list[int]], error: Exception) -> None:
        for setting, questions in asked.items():
            for q in questions:
                key = self.key(setting, spec, q)
                if not self.lines.has(key):
                    self.lines.add(Line(*key, error=f"{type(error).__name__}: {error}"))

    def _take_turns(self, spec: CacheSpec, cache, known: dict) -> None:
        """All questions, one after the other: each stands after what the model itself has said before."""
        left, n_asked = [], 0
        for q, question in enumerate(self.instance.questions):
            ids = self.prompt.turns[q - 1] if q else self.prompt.questions[0]
            n_asked += len(ids)
            said = self._answer("turns", spec, q, cache, feed(self.model, cache, left + ids), known, n_asked)
            # an answer that was cut off ends in a token that the cache has not seen
            left = said[question.max_new_tokens - 1 :]

    def _answer(self, setting: str, spec: CacheSpec, q: int, cache, logits, known: dict, n_asked: int) -> list[int]:
        question = self.instance.questions[q]
        said = decode(self.model, cache, logits, self.stops, question.max_new_tokens)
        answer = self.tokenizer.decode(said, skip_special_tokens=True)
        score = float(self.task.score(answer, question))
        found = dict(answer=answer, n_answer=len(said), score=score, n_asked=n_asked, **known)
        self.lines.add(Line(*self.key(setting, spec, q), **found))
        return said

    def _stage(self, spec: CacheSpec, settings: list[str]) -> str:
        return f"{self.task.name} · {self.length:,} · {self.i + 1} · {' + '.join(settings)} · {spec.text}"


def _fork(cache, reading: Reading, spec: CacheSpec):
    """A copy of a cache that has read a text, to be changed."""
    try:
        return copy.deepcopy(cache)
    except RuntimeError:
        # tensors of optimum-quanto cannot be copied: the text is compressed once more
        return reading.fill(spec)[0]
