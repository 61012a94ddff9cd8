"""Passkeys hidden in prose: retrieval for any language model.

Facts such as "The pass key of the lantern is 48213." stand at random places of a text; afterwards every one of them is
asked for. A question counts when greedy decoding would give all of the number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from hf_kvcache.compat import cache_argument
from hf_kvcache.long_prompts import begin

NAMES = (
    "lantern", "harbour", "orchard", "engine", "cathedral", "violin", "glacier", "market",
    "compass", "theatre", "granary", "falcon", "fountain", "telegraph", "vineyard", "anchor",
)  # fmt: skip


@dataclass(frozen=True)
class PasskeyPrompt:
    """One context and the questions about it.

    Attributes:
        context: token ids, `[1, n_tokens]`.
        turns: for every question its ids `[1, n]`, answer included, and how many of them are the answer.
    """

    context: torch.Tensor
    turns: list[tuple[torch.Tensor, int]]


def build_prompt(tokenizer, prose: np.ndarray, n_tokens: int, n_facts: int, rng) -> PasskeyPrompt:
    """A context of `n_tokens` tokens with `n_facts` facts between prose `[n]`, and a question for each."""
    numbers = rng.integers(10_000, 100_000, size=n_facts)
    names = rng.choice(NAMES, n_facts, replace=False)
    facts = [_encode(tokenizer, f" The pass key of the {a} is {b}. ") for a, b in zip(names, numbers, strict=True)]
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    n_prose = n_tokens - len(head) - sum(map(len, facts))
    if n_prose < n_facts:
        raise ValueError(f"{n_tokens} tokens do not hold {n_facts} facts between prose; use more tokens")
    text = np.take(prose, np.arange(n_prose) + rng.integers(len(prose)), mode="wrap")
    places = np.sort(rng.choice(n_prose, n_facts, replace=False))
    pieces = [head]
    for piece, fact in zip(np.split(text, places), [*facts, []], strict=True):
        pieces += [piece, fact]
    turns = []
    for name, number in zip(names, numbers, strict=True):
        question = f"\nThe pass key of the {name} is"
        ids = _encode(tokenizer, f"{question} {number}")
        turns.append((torch.tensor([ids]), len(ids) - len(_encode(tokenizer, question))))
    return PasskeyPrompt(torch.from_numpy(np.concatenate(pieces).astype(np.int64))[None], turns)


def build_prompts(
    tokenizer, prose: np.ndarray, n_tokens: int, n_prompts: int, n_facts: int = 16, seed: int = 0
) -> list[PasskeyPrompt]:
    rng = np.random.default_rng([seed, n_tokens])
    return [build_prompt(tokenizer, prose, n_tokens, n_facts, rng) for _ in range(n_prompts)]


@torch.no_grad()
def exact_match(model, prompts: list[PasskeyPrompt], make_cache: Callable) -> float:
    """Share of questions answered exactly; the context is prefilled once, every question reads a copy of its cache."""
    n_right = 0
    for prompt in prompts:
        context = make_cache()
        fed = begin(model, prompt.context.to(model.device), context)
        model(fed, **cache_argument(context), use_cache=True, logits_to_keep=1)
        for turn, n_answer in prompt.turns:
            ids, cache = turn.to(model.device), copy.deepcopy(context)
            logits = model(ids[:, :-1], **cache_argument(cache), use_cache=True, logits_to_keep=n_answer).logits
            n_right += torch.equal(logits.argmax(-1), ids[:, -n_answer:])
    return n_right / sum(len(prompt.turns) for prompt in prompts)


def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
