"""Tasks asked of one model behind many caches: what is read, compressed, asked and scored, in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from zlib import crc32

import numpy as np

from hf_kvcache.dmc import retrofits
from hf_kvcache.eval.asking import stops_of
from hf_kvcache.eval.batches import Asked, Missing, batches, most_new
from hf_kvcache.eval.lines import Lines
from hf_kvcache.eval.prompts import Prompter
from hf_kvcache.eval.questioning import Questioning
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
        max_new_tokens: the most tokens of an answer, where a task allows more; None for what the task allows.
    """

    n_questions: int = 1
    seed: int = 0
    uses_template: bool = True
    attention: str = "hf_kvcache"
    replays: bool = True
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Plan:
    """What is asked of which caches.

    Attributes:
        tasks: to ask.
        lengths: of prompts, in tokens, at most.
        n_instances: of every task and length.
        settings: names of `SETTINGS`.
        specs: caches, the baseline first.
        batch_size: instances that are read and asked together, at most.
    """

    tasks: tuple[Task, ...]
    lengths: tuple[int, ...]
    n_instances: int
    settings: tuple[str, ...]
    specs: tuple[CacheSpec, ...]
    batch_size: int = 1

    def blocks(self) -> Iterator[tuple[Task, int, range]]:
        """Task, length and numbers of instances: the first of all, then those after them, so that all rows fill alike.

        A block is larger than a batch, whose instances have questions of one length.
        """
        size = 1 if self.batch_size == 1 else 4 * self.batch_size
        for start in range(0, self.n_instances, size):
            for task, length in product(self.tasks, self.lengths):
                yield task, length, range(start, min(start + size, self.n_instances))

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
        prompt = prompter.prompt(instance)
        n_new = [most_new(question, settings.max_new_tokens) for question in instance.questions]
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

    Raises:
        ValueError: turns are asked of several instances together.
    """
    if "turns" in plan.settings and plan.batch_size > 1:
        raise ValueError("answers differ in length, so turns cannot be asked of several texts at once: batch_size=1")
    prompter, stops = Prompter(tokenizer, settings.uses_template), stops_of(model, tokenizer)
    try:
        for task, length, numbers in plan.blocks():
            missing = {i: _missing(plan, settings, lines, (task.name, length, i)) for i in numbers}
            n_all = len(numbers) * len(plan.settings) * len(plan.specs) * settings.n_questions
            advance("", n_all - sum(len(questions) for found in missing.values() for questions in found.values()))
            asked = []
            # nothing is built where nothing is missing
            for i in filter(missing.get, numbers):
                instance = build_instance(task, prompter, length, i, settings)
                asked.append(Asked(i, instance, prompter.prompt(instance), missing[i]))
            for batch in batches(task, length, asked, plan.batch_size, settings.max_new_tokens):
                questioning = Questioning(model, tokenizer, stops, lines, settings, batch)
                for stage, n in questioning.run(plan.settings, plan.specs):
                    advance(stage, n)
    finally:
        for child in retrofits(model).values():
            child.compresses = True


def _missing(plan: Plan, settings: Settings, lines: Lines, key: tuple) -> Missing:
    """Questions of an instance without an answer, by setting and cache; those that have all are left out."""
    found = {}
    for setting, spec in product(plan.settings, plan.specs):
        asked = [q for q in range(settings.n_questions) if not lines.has((*key, setting, spec.text, q))]
        if asked:
            found[setting, spec.text] = asked
    return found
