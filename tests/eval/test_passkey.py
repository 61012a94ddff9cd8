"""Passkeys in prose, asked of a model that copies what followed the same words before."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_kvcache.compat import given_cache
from hf_kvcache.eval.passkey import build_prompts, exact_match

N_TOKENS = 1500


class Letters:
    """A tokenizer with one token per character."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


class Copier:
    """A model whose next token is the one after the longest earlier match; its cache is a list of token ids."""

    device = torch.device("cpu")

    def __init__(self, window=None):
        self.window = window

    def __call__(self, ids, use_cache, logits_to_keep, **kwargs):
        said, fed = [], given_cache(kwargs)
        for token in ids[0].tolist():
            fed.append(token)
            said.append(self.follow(fed[-(self.window or len(fed)) :]))
        logits = torch.nn.functional.one_hot(torch.tensor([said[-logits_to_keep:]]), 256).float()
        return SimpleNamespace(logits=logits)

    @staticmethod
    def follow(seen):
        # a question ends in the name, " is" and some digits: ten letters tell the facts apart
        for n in (12, 8, 6):
            for i in range(len(seen) - n - 1, -1, -1):
                if seen[i : i + n] == seen[-n:]:
                    return seen[i + n]
        return 0


@pytest.fixture(scope="module")
def prompts():
    prose = np.random.default_rng(0).integers(97, 123, size=500)
    return build_prompts(Letters(), prose, N_TOKENS, n_prompts=1, n_facts=8)


def test_prompt_has_the_tokens_asked_for_and_every_fact(prompts):
    (prompt,) = prompts
    assert prompt.context.shape == (1, N_TOKENS)
    text = "".join(map(chr, prompt.context[0].tolist()))
    assert text.count("The pass key of the") == len(prompt.turns) == 8
    for turn, n_answer in prompt.turns:
        asked = "".join(map(chr, turn[0].tolist()))
        assert n_answer == len(" 12345")
        assert f"{asked.strip()}." in text


def test_model_that_remembers_answers_all(prompts):
    assert exact_match(Copier(), prompts, list) == 1.0


def test_model_that_forgets_answers_few(prompts):
    assert exact_match(Copier(window=150), prompts, list) < 0.5


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="100 tokens do not hold 8 facts"):
        build_prompts(Letters(), np.arange(97, 120), 100, n_prompts=1, n_facts=8)
