"""Facts of many kinds hidden in prose, and questions about all of them: prompts for any language model.

Sentences, names and words are none of those that `hf_kvcache.eval.tasks` asks for, so that what learns from these
prompts has not seen the tasks that it is measured by.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch

from hf_kvcache.calibration.prompts import Prompt
from hf_kvcache.eval.prompts import Prompter
from hf_kvcache.eval.tasks import vocabulary
from hf_kvcache.eval.tasks.instances import Instance, Question

INSTRUCTIONS = (
    "Read the text below carefully. Afterwards I will ask you about it.\n\n",
    "Here is a text. Remember the details, questions will follow.\n\n",
    "Study this passage and be ready to answer questions about it:\n",
    "",
)


@dataclass(frozen=True)
class Kind:
    """How facts of one kind are written and asked for, with `{key}` and `{value}`.

    Attributes:
        value: kind of the values, a key of `VALUES`.
        fact, question, prefix: the sentence in the text, the question, and how its answer begins.
    """

    value: str
    fact: str
    question: str
    prefix: str


KINDS = (
    Kind("number", "The pass key of the {key} is {value}.", "What is the pass key of the {key}?", "The pass key is"),
    Kind("number", "Note that {key} = {value}.", "Which value does {key} have?", "{key} ="),
    Kind("number", "{value} is what it takes to open {key}.", "What does it take to open {key}?", "It takes"),
    Kind("number", "To reach {key}, call {value}.", "Which number reaches {key}?", "The number of {key} is"),
    Kind("uuid", "The file {key} has the identifier {value}.", "Which identifier has the file {key}?", "It is"),
    Kind("uuid", '"{key}": "{value}",', 'What is stored under "{key}"?', '"{key}": "'),
    Kind("word", "The code word for the {key} is {value}.", "What is the code word for the {key}?", "It is"),
    Kind("word", "The captain of the ship {key} was born in {value}.", "Where was the captain of {key} born?", "In"),
    Kind("time", "The meeting about the {key} begins at {value}.", "When does the meeting about {key} begin?", "At"),
    Kind("letters", "{key} is set to {value}.", "What is {key} set to?", "{key} is set to"),
)


@dataclass(frozen=True)
class Sequence:
    """A prompt with its questions and answers, to be trained on.

    Attributes:
        ids: token ids `[n]`.
        is_answer: which of them answer a question, boolean `[n]`.
    """

    ids: torch.Tensor
    is_answer: torch.Tensor


class Facts:
    """Makes prompts of prose with facts in it.

    Args:
        tokenizer: any; prompts are turns of the user where it has a chat template.
        stream: token ids of the prose `[n]`.
    """

    def __init__(self, tokenizer, stream: np.ndarray):
        self.tokenizer, self.stream, self.prompter = tokenizer, stream, Prompter(tokenizer)
        words = set(re.findall(r"(?<![\w'-])[a-z]{4,9}(?![\w'-])", tokenizer.decode(stream[:50_000])))
        self.words = sorted(words - {*vocabulary.ADJECTIVES, *vocabulary.NOUNS})
        if len(self.words) < 100:
            raise ValueError(
                f"the text has {len(self.words)} different words, too few to name facts by: use more text, or "
                "--prose-share 1 for none"
            )

    def prompt(self, n_tokens: int, n_answer: int, n_query: int, rng: np.random.Generator) -> Prompt:
        """A context of `n_tokens` tokens; the answer is every question with what is right to say.

        Args:
            n_answer: most tokens of questions and answers together, which decides how many facts there are; one at
                least.
            n_query: 0 asks for every fact, else one is asked for, and is the query.

        Raises:
            ValueError: so few tokens hold no fact between prose.
        """
        head, facts, turns, said = self._drawn(min(n_answer // 24, n_tokens // 48), rng)
        if n_query:
            turns, said = turns[:1], said[:1]
        answer = [token for pair in zip(turns, said) for part in pair for token in part]
        context = self._hide(head, facts, n_tokens, rng)
        n_answer = max(n_answer, len(turns[0] + said[0]))
        return Prompt(torch.tensor(context), torch.tensor(turns[0]), torch.tensor(answer[:n_answer]))

    def sequence(self, n_tokens: int, rng: np.random.Generator) -> Sequence:
        """`n_tokens` tokens: a context, then questions and answers, which take at most half of them.

        Raises:
            ValueError: so few tokens hold no fact between prose.
        """
        head, facts, turns, said = self._drawn(n_tokens // 72, rng)
        asked, is_answer = [], []
        for turn, words in zip(turns, said, strict=True):
            if len(asked) + len(turn) + len(words) <= n_tokens // 2:
                asked += turn + words
                is_answer += [False] * len(turn) + [True] * len(words)
        context = self._hide(head, facts, n_tokens - len(asked), rng)
        return Sequence(torch.tensor(context + asked), torch.tensor([False] * len(context) + is_answer))

    def _drawn(self, n_most: int, rng) -> tuple[list[int], list[str], list[list[int]], list[list[int]]]:
        """What a prompt begins with, facts, and in another order what asks for each and what is right to say."""
        instruction = str(rng.choice(INSTRUCTIONS))
        # few facts stand alone, many tell what tells them from each other
        n = max(int(np.exp(rng.uniform(0, np.log(max(n_most, 1) + 0.999)))), 1)
        facts, questions = zip(*(self._draw(rng) for _ in range(n)))
        order = rng.permutation(n)
        asked = self.prompter.prompt(Instance(instruction, "", tuple(questions[i] for i in order)))
        said = [self._encode(f" {questions[i].answers[0]}") for i in order]
        return asked.context, [facts[i] for i in rng.permutation(n)], [asked.questions[0], *asked.turns], said

    def _draw(self, rng) -> tuple[str, Question]:
        kind = KINDS[int(rng.integers(len(KINDS)))]
        n_words = int(rng.integers(1, 3))
        key = "-".join(map(str, rng.choice(self.words, n_words, replace=False)))
        if kind.value == "letters":
            key = "".join(map(chr, rng.integers(65, 91, 4)))
        value = self._value(kind.value, rng)
        question, prefix = (text.format(key=key, value=value) for text in (kind.question, kind.prefix))
        return kind.fact.format(key=key, value=value), Question(question, (value,), f" {prefix}")

    def _value(self, kind: str, rng) -> str:
        if kind == "number":
            return vocabulary.numbers(1, rng, int(rng.integers(3, 9)))[0]
        if kind == "uuid":
            return vocabulary.uuids(1, rng)[0]
        if kind == "time":
            return f"{rng.integers(24)}:{rng.integers(60):02}"
        if kind == "letters":
            return str(rng.integers(10_000, 100_000)) if rng.random() < 0.5 else self._value("word", rng).upper()
        return str(rng.choice(self.words))

    def _hide(self, head: list[int], facts: list[str], n_tokens: int, rng) -> list[int]:
        """Token ids `[n_tokens]`: the head, and prose with facts behind the ends of sentences."""
        pieces, end = [self._encode(f" {fact}") for fact in facts], self._encode("\n")
        n_prose = n_tokens - len(head) - len(end) - sum(map(len, pieces))
        if n_prose < len(pieces):
            raise ValueError(f"{n_tokens} tokens do not hold {len(pieces)} facts between prose; use more tokens")
        prose = np.take(self.stream, np.arange(n_prose) + rng.integers(len(self.stream)), mode="wrap")
        texts = self.tokenizer.batch_decode(prose[:, None])
        ends = [i + 1 for i, text in enumerate(texts) if text.rstrip().endswith((".", "!", "?"))]
        among = ends if len(ends) >= len(pieces) else range(n_prose)
        places, found = np.sort(rng.choice(among, len(pieces), replace=False)), list(head)
        for part, piece in zip(np.split(prose, places), [*pieces, []], strict=True):
            found += [*part.tolist(), *piece]
        return found + end

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
