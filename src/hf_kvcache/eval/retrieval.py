"""One-hop retrieval: ledger entries scattered through prose, asked for at the end.

An entry such as `k07=v3` is one token that names key and value; the question `k07?` is answered by the one
token `v3`. Finding the entry is a single attention hop, so a small model does it exactly over thousands of
tokens, and a cache that lost or blurred the entry shows at once. Pure functions all, seeded by their caller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from hf_kvcache.compat import cache_argument
from hf_kvcache.long_prompts import begin

N_KEYS = 64
N_VALUES = 8


def ledger_tokens() -> list[str]:
    """Printed forms of all ledger tokens: entries, then questions, then answers."""
    entries = [f"k{key:02d}=v{value}" for key in range(N_KEYS) for value in range(N_VALUES)]
    return entries + [f"k{key:02d}?" for key in range(N_KEYS)] + [f"v{value}" for value in range(N_VALUES)]


@dataclass(frozen=True)
class Ledger:
    """Token ids of the ledger in one tokenizer.

    Args:
        entries (np.ndarray):
            id of the token that says "key has value", `[n_keys, n_values]`.
        questions (np.ndarray):
            id of the token that asks for a key, `[n_keys]`.
        answers (np.ndarray):
            id of the token that names a value, `[n_values]`.
        space (int):
            id of the single space printed before an entry and before a question.
        bos (int):
            id that opens every context.
        starts_word (np.ndarray):
            whether a token begins with white space, so that an entry may stand before it, bool `[vocab]`.
    """

    entries: np.ndarray
    questions: np.ndarray
    answers: np.ndarray
    space: int
    bos: int
    starts_word: np.ndarray

    @classmethod
    def from_tokenizer(cls, tokenizer) -> Ledger:
        """Look the ledger up in a byte-level BPE tokenizer; raises if it has no ledger tokens."""
        vocab = tokenizer.get_vocab()
        missing = [token for token in ledger_tokens() if token not in vocab]
        if missing:
            raise ValueError(
                f"the tokenizer lacks {len(missing)} ledger tokens (first: {missing[0]!r}); "
                "retrieval needs the embedded model or one trained by trainers/pretrain_small.py"
            )
        ids = np.array([vocab[token] for token in ledger_tokens()])
        n_entries = N_KEYS * N_VALUES
        starts_word = np.zeros(max(vocab.values()) + 1, dtype=bool)
        # Ġ and Ċ are how byte-level BPE writes space and line feed
        starts_word[[i for token, i in vocab.items() if token[0] in "ĠĊ"]] = True
        return cls(
            entries=ids[:n_entries].reshape(N_KEYS, N_VALUES),
            questions=ids[n_entries : n_entries + N_KEYS],
            answers=ids[n_entries + N_KEYS :],
            space=vocab["Ġ"],
            bos=tokenizer.bos_token_id,
            starts_word=starts_word,
        )


@dataclass(frozen=True)
class LedgerPrompts:
    """A batch of contexts of one length with questions that may be asked of them, in any order.

    Args:
        context (torch.Tensor):
            prompt to prefill, `[B, n_tokens]`.
        asks (torch.Tensor):
            what to feed for each question, `[B, n_questions, 2]`.
        answers (torch.Tensor):
            the token the model must answer with, `[B, n_questions]`.
        depths (torch.Tensor):
            where in the context the asked entry stands, `[B, n_questions]`.
    """

    context: torch.Tensor
    asks: torch.Tensor
    answers: torch.Tensor
    depths: torch.Tensor

    def with_answers(self) -> torch.Tensor:
        """Context, then question and answer in turn, `[B, n_tokens + 3 * n_questions]`."""
        turns = torch.cat([self.asks, self.answers[..., None]], dim=-1)  # [B, Q, 3]
        return torch.cat([self.context, turns.flatten(1)], dim=1)


def draw_n_entries(rng: np.random.Generator, low: int = 8, high: int = N_KEYS) -> int:
    """Number of entries of one context, log-uniform in `[low, high]`."""
    return int(round(float(np.exp(rng.uniform(np.log(low), np.log(high))))))


def build_prompt(
    ledger: Ledger,
    filler: np.ndarray,
    n_tokens: int,
    n_entries: int,
    n_questions: int,
    rng: np.random.Generator,
) -> LedgerPrompts:
    """One context of exactly `n_tokens` tokens, `bos` and entries included, with `n_questions` questions.

    Args:
        ledger (Ledger):
            token ids to write with.
        filler (np.ndarray):
            token ids of prose, `[n]`; read from a random place, from the start again where it ends.
        n_entries (int):
            different keys in the context, each once, at random word boundaries.
        n_questions (int):
            how many of them are asked.
    """
    n_prose = n_tokens - 1 - 2 * n_entries
    if n_prose < n_entries or not n_questions <= n_entries <= N_KEYS:
        raise ValueError(
            f"{n_tokens} tokens do not hold {n_entries} entries between prose with {n_questions} questions: "
            f"use more tokens, at most {N_KEYS} entries, and no more questions than entries"
        )
    prose = np.take(filler, np.arange(n_prose) + rng.integers(len(filler)), mode="wrap").astype(np.int64)
    places = np.flatnonzero(ledger.starts_word[prose])
    # prose with fewer words than entries: stand between any two tokens
    places = places if len(places) >= n_entries else np.arange(n_prose)
    places = np.sort(rng.choice(places, n_entries, replace=False))
    keys = rng.choice(N_KEYS, n_entries, replace=False)
    values = rng.integers(N_VALUES, size=n_entries)

    written = np.stack([np.full(n_entries, ledger.space), ledger.entries[keys, values]], axis=1)
    context = np.concatenate([[ledger.bos], np.insert(prose, np.repeat(places, 2), written.ravel())])
    depths = 1 + places + 2 * np.arange(n_entries) + 1

    asked = rng.choice(n_entries, n_questions, replace=False)
    asks = np.stack([np.full(n_questions, ledger.space), ledger.questions[keys[asked]]], axis=1)
    parts = context, asks, ledger.answers[values[asked]], depths[asked]
    return LedgerPrompts(*(torch.from_numpy(part.astype(np.int64))[None] for part in parts))


def build_prompts(
    ledger: Ledger,
    filler: np.ndarray,
    n_tokens: int,
    n_prompts: int,
    n_questions: int = 8,
    n_entries: int | None = None,
    seed: int = 0,
) -> LedgerPrompts:
    """A batch of `n_prompts` contexts of `n_tokens` tokens; `n_entries=None` draws 8 to 64 for each."""
    rng = np.random.default_rng([seed, n_tokens])
    rows = []
    for _ in range(n_prompts):
        n = n_entries or draw_n_entries(rng, low=max(8, n_questions))
        rows.append(build_prompt(ledger, filler, n_tokens, n, n_questions, rng))
    fields = zip(*(vars(row).values() for row in rows), strict=True)
    return LedgerPrompts(*(torch.cat(parts) for parts in fields))


@torch.no_grad()
def exact_match(model, prompts: LedgerPrompts, make_cache: Callable | None = None) -> float:
    """Share of questions whose greedy answer token is the right one.

    The context is prefilled once; questions follow each other as in training, each after the right answer to
    the one before, so a question costs one forward of three tokens.
    """
    if make_cache is None:
        from transformers import DynamicCache as make_cache
    prompts = LedgerPrompts(*(part.to(model.device) for part in vars(prompts).values()))
    cache = make_cache()
    model(begin(model, prompts.context, cache), **cache_argument(cache), use_cache=True, logits_to_keep=1)
    n_right = 0
    for i in range(prompts.answers.shape[1]):
        said = prompts.answers[:, i - 1 : i] if i else prompts.answers[:, :0]
        ids = torch.cat([said, prompts.asks[:, i]], dim=1)  # [B, 2 or 3]
        logits = model(ids, **cache_argument(cache), use_cache=True, logits_to_keep=1).logits[:, -1]
        n_right += (logits.argmax(-1) == prompts.answers[:, i]).sum().item()
    return n_right / prompts.answers.numel()
