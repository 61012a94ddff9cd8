"""Variable tracking: RULER's task of several hops (Hsieh et al. 2024, arXiv 2404.06654, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from string import ascii_uppercase

import numpy as np

from hf_kvcache.eval.tasks import haystacks, vocabulary
from hf_kvcache.eval.tasks.filling import fill
from hf_kvcache.eval.tasks.instances import Instance, Question, Task
from hf_kvcache.eval.tasks.scoring import string_match_all

N_HOPS = 4
INSTRUCTION = "Follow the assignments of variables that are hidden in the text below.\n\n"


def names(n: int, n_letters: int, rng: np.random.Generator) -> list[str]:
    """`n` different names of `n_letters` capitals."""
    shape = [len(ascii_uppercase)] * n_letters
    drawn = np.unravel_index(rng.choice(np.prod(shape), n, replace=False), shape)
    return ["".join(ascii_uppercase[i] for i in at) for at in zip(*drawn, strict=True)]


def tracked(n: int, n_letters: int, n_chains: int, rng: np.random.Generator) -> tuple[str, list[tuple[str, list[str]]]]:
    """A text of `n` sentences and the assignments of `n_chains` chains; then each chain's value and variables.

    Assignments of a chain stand in order: a variable is used after it has been assigned.
    """
    variables = np.array(names(n_chains * (N_HOPS + 1), n_letters, rng)).reshape(n_chains, -1).tolist()
    values = vocabulary.numbers(n_chains, rng, n_digits=5)
    lines, needles, before = haystacks.noise(n), [], []
    for value, chain in zip(values, variables, strict=True):
        needles.append(f"VAR {chain[0]} = {value}")
        needles += [f"VAR {name} = VAR {source}" for source, name in zip(chain, chain[1:], strict=False)]
        before.append(np.sort(haystacks.places(len(lines), len(chain), rng)))
    text = "\n".join(haystacks.insert(lines, needles, np.concatenate(before)))
    return text, list(zip(values, variables, strict=True))


def ask(value: str, variables: list[str]) -> Question:
    return Question(
        text=f"\nQuestion: Which variables have the value {value} in the text above? Find all of them.",
        answers=tuple(variables),
        prefix=f" Answer: By the assignments in the text above, {len(variables)} variables have the value {value}:",
        max_new_tokens=30,
    )


def make(n: int, rng: np.random.Generator, n_questions: int) -> Instance:
    """An instance with `n` sentences between the assignments, after a short example with an answer."""
    example, [found] = tracked(10, 3, 1, rng)
    asked = ask(*found)
    instruction = f"{INSTRUCTION}{example}{asked.text}{asked.prefix} {' '.join(asked.answers)}\n\n{INSTRUCTION}"
    context, chains = tracked(n, 5, n_questions, rng)
    return Instance(instruction, context, tuple(ask(*chain) for chain in chains))


def build(count: Callable[[str], int], n_tokens: int, rng: np.random.Generator, n_questions: int = 1) -> Instance:
    return fill("vt", partial(make, n_questions=n_questions), count, n_tokens, rng, 10)


TASKS = (
    Task(
        "vt",
        "all variables with a value, over four hops of assignments",
        build,
        string_match_all,
        "Hsieh et al. 2024, arXiv 2404.06654",
    ),
)
