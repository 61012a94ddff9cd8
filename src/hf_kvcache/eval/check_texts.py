"""What a cache is checked on: pieces of prose that are gone on with, and texts with needles that are asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_kvcache.eval import retrieval
from hf_kvcache.eval.prompts import Prompter
from hf_kvcache.eval.tasks import TASKS
from hf_kvcache.eval.tasks.instances import Question
from hf_kvcache.models import embedded_prose

NEEDLES = ("niah_single_2", "niah_multikey_1")
N_QUESTIONS = 2
# tokens that an answer may take beside those of the right one
N_BESIDE = 12


@dataclass(frozen=True)
class Asked:
    """One question about a text, as token ids.

    Attributes:
        question: that answers are scored by.
        ids: what stands between the text and the answer.
        said: the right answer.
        n_new: the most tokens of an answer.
    """

    question: Question
    ids: list[int]
    said: list[int]
    n_new: int

    def with_answer(self) -> tuple[list[int], list[int]]:
        """Question and right answer, and the places in them whose predictions are of the answer."""
        n_ids = len(self.ids)
        return self.ids + self.said, list(range(n_ids - 1, n_ids - 1 + len(self.said)))


@dataclass(frozen=True)
class NeedleText:
    """A text, which is read and compressed, and questions about it, each of which is asked of a copy of the cache."""

    context: list[int]
    asked: list[Asked]


def needle_texts(tokenizer, n_tokens: int, n: int, seed: int = 0) -> list[NeedleText]:
    """Texts with needles and two questions each: the ledger's where the tokenizer has one, else RULER's in prose.

    Raises:
        ValueError: needles and questions do not fit into so few tokens.
    """
    drawn = [np.random.default_rng([seed, n_tokens, i]) for i in range(n)]
    try:
        ledger = retrieval.Ledger.from_tokenizer(tokenizer)
    except ValueError:
        prompter = Prompter(tokenizer)
        return [_in_prose(prompter, NEEDLES[i % len(NEEDLES)], n_tokens, rng) for i, rng in enumerate(drawn)]
    prose = tokenizer(embedded_prose().read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    return [_in_a_ledger(tokenizer, ledger, np.array(prose), n_tokens, rng) for rng in drawn]


def _in_prose(prompter: Prompter, name: str, n_tokens: int, rng: np.random.Generator) -> NeedleText:
    instance = TASKS[name].build(prompter.count, n_tokens - prompter.n_added(), rng, n_questions=N_QUESTIONS)
    prompt, asked = prompter.prompt(instance), []
    for question, ids in zip(instance.questions, prompt.questions, strict=True):
        said = prompter.tokenizer(" " + ", ".join(question.answers), add_special_tokens=False)["input_ids"]
        asked.append(Asked(question, ids, said, len(said) + N_BESIDE))
    return NeedleText(prompt.context, asked)


def _in_a_ledger(tokenizer, ledger: retrieval.Ledger, prose: np.ndarray, n_tokens: int, rng) -> NeedleText:
    n_entries = min(max(n_tokens // 64, N_QUESTIONS), retrieval.N_KEYS)
    prompt = retrieval.build_prompt(ledger, prose, n_tokens, n_entries, N_QUESTIONS, rng)
    asked = [
        Asked(Question("", (tokenizer.decode([said]).strip(),)), ids, [said], 1)
        for ids, said in zip(prompt.asks[0].tolist(), prompt.answers[0].tolist(), strict=True)
    ]
    return NeedleText(prompt.context[0].tolist(), asked)
