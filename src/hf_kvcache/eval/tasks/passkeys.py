"""Looking up: a pass key in sentences that repeat, and the value of a key in JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import numpy as np

from hf_kvcache.eval.tasks import haystacks, vocabulary
from hf_kvcache.eval.tasks.filling import fill
from hf_kvcache.eval.tasks.instances import Instance, Question, Task
from hf_kvcache.eval.tasks.scoring import first_number, string_match_all


def make_passkey(n: int, rng: np.random.Generator, n_questions: int) -> Instance:
    """A pass key of five digits in `n` sentences, or several that belong to things."""
    values = vocabulary.numbers(n_questions, rng, n_digits=5)
    things = [""] if n_questions == 1 else [f" of the {word}" for word in vocabulary.compounds(n_questions, rng)]
    pairs = list(zip(things, values, strict=True))
    needles = [f"The pass key{of} is {value}. Keep it in mind. {value} is the pass key{of}." for of, value in pairs]
    lines = haystacks.noise(n)
    lines = haystacks.insert(lines, needles, haystacks.places(len(lines), n_questions, rng))
    return Instance(
        "Something important is hidden in a long text that does not matter. Find it and keep it in mind: I will ask "
        "you for it afterwards.\n",
        "\n".join(lines),
        tuple(Question(f"\nWhat is the pass key{of}?", (value,), f" The pass key{of} is", 16) for of, value in pairs),
    )


def make_pairs(n: int, rng: np.random.Generator, n_questions: int) -> Instance:
    """A JSON object of `n` pairs of UUIDs."""
    keys, values = vocabulary.uuids(n, rng), vocabulary.uuids(n, rng)
    asked = rng.choice(n, n_questions, replace=False)
    questions = (Question(f'\n\nKey: "{keys[i]}"', (values[i],), "\nIts value:", 64) for i in asked)
    return Instance(
        "Find the value that belongs to a key in the JSON object below.\n\n",
        json.dumps(dict(zip(keys, values, strict=True)), indent=1),
        tuple(questions),
    )


def build_passkey(
    count: Callable[[str], int], n_tokens: int, rng: np.random.Generator, n_questions: int = 1
) -> Instance:
    return fill("passkey", partial(make_passkey, n_questions=n_questions), count, n_tokens, rng, 5)


def build_pairs(count: Callable[[str], int], n_tokens: int, rng: np.random.Generator, n_questions: int = 1) -> Instance:
    make = partial(make_pairs, n_questions=n_questions)
    return fill("kv_retrieval", make, count, n_tokens, rng, max(2, n_questions))


TASKS = (
    Task(
        "passkey",
        "a number of five digits, in sentences that repeat",
        build_passkey,
        first_number,
        "Mohtashami and Jaggi 2023, arXiv 2305.16300",
    ),
    Task(
        "kv_retrieval",
        "the value of a key in a JSON object of UUIDs",
        build_pairs,
        string_match_all,
        "Liu et al. 2023, arXiv 2307.03172",
    ),
)
