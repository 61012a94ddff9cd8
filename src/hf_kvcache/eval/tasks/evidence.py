"""An instance that cannot be answered: what a model scores on it, it scores without having read."""

from __future__ import annotations

import re
from dataclasses import replace

from hf_kvcache.eval.tasks.instances import Instance, Task


def without_answers(instance: Instance) -> Instance:
    """The same text and questions, with every expected string taken out of the text."""
    answers = {answer for question in instance.questions for answer in question.answers}
    # the longest first: one may stand inside another
    longest_first = sorted(answers, key=lambda answer: (-len(answer), answer))
    pattern = "|".join(rf"(?<!\w){re.escape(answer)}(?!\w)" for answer in longest_first)
    return replace(instance, context=re.sub(pattern, "", instance.context, flags=re.IGNORECASE))


def task_without_answers(task: Task) -> Task:
    """The same task, whose instances, drawn from the same `rng`, have no expected string in their texts."""

    def build(*args, **kwargs) -> Instance:
        return without_answers(task.build(*args, **kwargs))

    return replace(task, build=build)
