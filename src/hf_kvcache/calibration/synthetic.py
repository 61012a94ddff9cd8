"""Prompts made of plain text: with facts to retrieve scattered through it, or as it is, answered by what follows."""

from __future__ import annotations

import numpy as np
import torch

from hf_kvcache.calibration.facts import Facts
from hf_kvcache.calibration.prompts import Prompt
from hf_kvcache.eval import retrieval


class Synthetic(torch.utils.data.Dataset):
    """Windows of a text with facts in them, each the same whenever it is asked for.

    Args:
        tokenizer: with the ledger's tokens facts are entries of the ledger, else sentences (`Facts`).
        stream: token ids of the text `[n]`; a window that is longer goes on from the start.
        prompt_tokens: tokens of a prompt.
        answer_tokens: tokens of the answer to a window without facts: what follows it; and at most of questions about
            sentences with their answers.
        prose_share: share of the windows that are without.
        n_query: tokens of questions that a query has room for; 0 asks for every fact.
        n, seed: how many prompts there are, and which.

    Raises:
        ValueError: prompts of that length hold no facts between prose.
    """

    LEAST = 128  # tokens of a prompt

    def __init__(
        self,
        tokenizer,
        stream: np.ndarray,
        prompt_tokens: int,
        answer_tokens: int,
        prose_share: float,
        n_query: int,
        n: int,
        seed: int,
    ):
        if prompt_tokens < self.LEAST:
            raise ValueError(f"prompt_tokens={prompt_tokens} holds no facts between prose; use {self.LEAST} or more")
        self.tokenizer, self.stream, self.prompt_tokens = tokenizer, stream, prompt_tokens
        self.answer_tokens, self.prose_share, self.n_query = answer_tokens, prose_share, n_query
        self.n, self.seed = n, seed
        try:
            self.ledger = retrieval.Ledger.from_tokenizer(tokenizer)
        except ValueError:
            self.ledger, self.facts = None, Facts(tokenizer, stream)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Prompt:
        rng = np.random.default_rng([self.seed, i])
        if rng.random() < self.prose_share:
            return self._prose(rng)
        if self.ledger is None:
            return self.facts.prompt(self.prompt_tokens, self.answer_tokens, self.n_query, rng)
        return self._ledger(rng)

    def _prose(self, rng) -> Prompt:
        bos = self.tokenizer.bos_token_id
        head = [] if bos is None else [bos]
        n = self.prompt_tokens - len(head)
        window = np.take(self.stream, np.arange(n + self.answer_tokens) + rng.integers(len(self.stream)), mode="wrap")
        window = torch.from_numpy(window.astype(np.int64))
        return Prompt(torch.cat([torch.tensor(head, dtype=torch.long), window[:n]]), window[:0], window[n:])

    def _ledger(self, rng) -> Prompt:
        n_entries = retrieval.draw_n_entries(rng, high=min(retrieval.N_KEYS, self.prompt_tokens // 16))
        n_questions = min(n_entries, max(self.n_query // 2, 1)) if self.n_query else n_entries
        parts = retrieval.build_prompt(self.ledger, self.stream, self.prompt_tokens, n_entries, n_questions, rng)
        turns = torch.cat([parts.asks, parts.answers.unsqueeze(-1)], -1)  # [1, Q, 3]
        return Prompt(parts.context[0], parts.asks.flatten(), turns.flatten())
