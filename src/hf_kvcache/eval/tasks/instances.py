"""What a task asks of a model: a text to read, and questions about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One question about a context.

    Attributes:
        text: what follows the context: the question, as a user would put it.
        answers: strings that an answer is scored by.
        prefix: what the answer begins with already; fed to the model, not scored.
        max_new_tokens: tokens that an answer may take.
        choices: all that can be answered, for scorers that go by it.
    """

    text: str
    answers: tuple[str, ...]
    prefix: str = ""
    max_new_tokens: int = 32
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Instance:
    """One text and what is asked about it.

    A prompt is `instruction + context + question.text + question.prefix`, white space between them included.

    Attributes:
        instruction: what stands before the context and says what will be asked for, whatever the question.
        context: the text; the longest part, of which a cache keeps what it can.
        questions: one at least. Where several are asked, each is about the same context.
        is_plain: whether it is a text to be gone on with, which is read without a chat template.
    """

    instruction: str
    context: str
    questions: tuple[Question, ...]
    is_plain: bool = False


@dataclass(frozen=True)
class Task:
    """A kind of instances, which are generated, and how answers to their questions are scored.

    Attributes:
        name: as typed: "niah_single_1".
        summary: one line.
        build: an instance of about `n_tokens` tokens, never more, the longest question and the answer to it included:
            `build(count, n_tokens, rng, n_questions=1)`, where `count` says how many tokens a text has, and everything
            that is drawn is drawn from `rng`. One question is the published form; with more, each asks for one thing of
            the same context, into which more is put if need be. Tasks that can ask only one thing (`cwe`, `fwe`) ask
            one question. Raises ValueError where `n_tokens` are too few.
        score: share of a question that an answer gets right, 0 to 1: `score(answer, question)`.
        paper: where it is defined, and its arXiv number.
        n_instances: how many there are with that many questions each, `n_instances(n_questions)`; None where they are
            drawn without end. Where there is an end, `build` is given the instance's number, too: `i`, from 0.
    """

    name: str
    summary: str
    build: Callable[..., Instance]
    score: Callable[[str, Question], float]
    paper: str = ""
    n_instances: Callable[[int], int] | None = None
