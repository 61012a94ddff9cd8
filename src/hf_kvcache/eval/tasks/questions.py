"""Questions about paragraphs: RULER's question answering (Hsieh et al. 2024, arXiv 2404.06654, section 3.4)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from hf_kvcache.eval.tasks.filling import fill
from hf_kvcache.eval.tasks.instances import Instance, Question, Task
from hf_kvcache.eval.tasks.scoring import string_match_part

RULES = "Answer from the documents that are given here. Say the answer only, and nothing else."


@dataclass(frozen=True)
class Asked:
    """A question, answers that are right, and the paragraphs, by number, that have to be read for it."""

    question: str
    answers: tuple[str, ...]
    paragraphs: tuple[int, ...]


@dataclass(frozen=True)
class Collection:
    """Paragraphs, and questions about some of them."""

    paragraphs: tuple[str, ...]
    asked: tuple[Asked, ...]

    def make(self, n: int, rng: np.random.Generator, n_questions: int) -> Instance:
        """An instance with `n` sentences of other paragraphs beside those that the questions are about."""
        asked = self._draw(rng, n_questions)
        needed = sorted({i for question in asked for i in question.paragraphs})
        answers = {answer.lower() for question in asked for answer in question.answers}
        # a paragraph with an answer in it would answer, too
        others = [i for i in range(len(self.paragraphs)) if i not in needed and not self._has(i, answers)]
        if not others:
            raise ValueError(f"{n_questions} questions leave no paragraph without an answer to them")
        documents = [self.paragraphs[i] for i in needed]
        while n > 0:
            # once all have been used they come again, as in RULER
            for i in rng.permutation(others):
                sentences = re.split(r"(?<=[.!?])\s+", self.paragraphs[i])[:n]
                n -= len(sentences)
                documents.append(" ".join(sentences))
                if n == 0:
                    break
        order = rng.permutation(len(documents))
        context = "\n\n".join(f"Document {k}:\n{documents[i]}" for k, i in enumerate(order, 1))
        questions = (
            Question(f"\n\n{RULES}\n\nQuestion: {question.question}", question.answers, " Answer:", 32)
            for question in asked
        )
        return Instance(f"{RULES}\n\nThe documents are:\n\n", context, tuple(questions))

    def _draw(self, rng: np.random.Generator, n_questions: int) -> list[Asked]:
        """Questions about different paragraphs."""
        drawn: list[Asked] = []
        used: set[int] = set()
        for i in rng.permutation(len(self.asked)):
            if len(drawn) < n_questions and used.isdisjoint(self.asked[i].paragraphs):
                drawn.append(self.asked[i])
                used.update(self.asked[i].paragraphs)
        if len(drawn) < n_questions:
            raise ValueError(
                f"{n_questions} questions about different paragraphs asked for, and there are {len(drawn)}"
            )
        return drawn

    def _has(self, i: int, answers: set[str]) -> bool:
        paragraph = self.paragraphs[i].lower()
        return any(answer in paragraph for answer in answers)


@cache
def own(kind: str) -> Collection:
    """The project's paragraphs of invented facts, with its "questions" or its "two_hops"."""
    found = json.loads((Path(__file__).parent / "paragraphs.json").read_text(encoding="utf-8"))
    asked = (Asked(row["question"], tuple(row["answers"]), tuple(row["paragraphs"])) for row in found[kind])
    return Collection(tuple(found["paragraphs"]), tuple(asked))


def squad(path: str | Path) -> Collection:
    """What is in a local JSON file of SQuAD (versions 1.1 and 2.0); questions without an answer are left out."""
    articles = json.loads(Path(path).read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    asked = (
        Asked(row["question"], tuple(dict.fromkeys(answer["text"] for answer in row["answers"])), (i,))
        for i, paragraph in enumerate(paragraphs)
        for row in paragraph["qas"]
        if row["answers"]
    )
    return Collection(tuple(paragraph["context"] for paragraph in paragraphs), tuple(asked))


def hotpot(path: str | Path) -> Collection:
    """What is in a local JSON file of HotpotQA; a question needs the paragraphs of its supporting facts."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    numbers: dict[str, int] = {}
    asked = []
    for row in rows:
        texts = {title: f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]}
        for text in texts.values():
            numbers.setdefault(text, len(numbers))
        titles = dict.fromkeys(title for title, _ in row["supporting_facts"])
        needed = tuple(numbers[texts[title]] for title in titles if title in texts)
        asked.append(Asked(row["question"], (row["answer"],), needed))
    return Collection(tuple(numbers), tuple(asked))


def build(
    name: str,
    collection: Callable[[], Collection],
    count: Callable[[str], int],
    n_tokens: int,
    rng: np.random.Generator,
    n_questions: int = 1,
) -> Instance:
    return fill(name, partial(collection().make, n_questions=n_questions), count, n_tokens, rng)


def task(name: str, summary: str, collection: Callable[[], Collection]) -> Task:
    """A task of a collection, which is read when an instance is built: `task("qa_1", "SQuAD", lambda: squad(path))`."""
    return Task(
        name, summary, partial(build, name, collection), string_match_part, "Hsieh et al. 2024, arXiv 2404.06654"
    )


TASKS = (
    task("qa_1", "a fact in one of many paragraphs", partial(own, "questions")),
    task("qa_2", "a fact that takes two of many paragraphs", partial(own, "two_hops")),
)
