"""Batches of text for retrofits, with something to be found again: ledgers where the tokenizer has them, else facts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hf_kvcache.calibration.facts import Facts
from hf_kvcache.eval.retrieval import Ledger
from hf_kvcache.trainers.common import place_of, read_texts
from hf_kvcache.trainers.dmc_options import Optimisation, Texts
from hf_kvcache.trainers.pretrain_small import LedgerMix

LEDGER_PROSE = 0.25  # share of sequences without a ledger, unless told
CHARACTERS = 8  # of text per token to be read, twice what a token has
PIECE = 40_000  # characters of a text at least, where not all are read: whole pages, not the ends of sentences


def load_batches(texts: Texts, optimisation: Optimisation, tokenizer, n_steps: int, world_size: int):
    """A dataset whose item is a batch: windows of text, some with a ledger or with facts, as `texts` asks for.

    Raises:
        ValueError: the text is too short.
    """
    rows, n_items = optimisation.batch_size, n_steps * optimisation.accumulation
    stream = load_stream(texts.data, tokenizer, n_items * world_size * rows * texts.sequence)
    if len(stream) <= texts.sequence:
        raise ValueError(f"{texts.data} has {len(stream)} tokens, a sequence needs {texts.sequence + 1}")
    skip = tokenizer.eos_token_id if texts.skip_eos else None
    try:
        ledger = Ledger.from_tokenizer(tokenizer)
    except ValueError:
        windows = stream, texts.sequence, rows, n_items * world_size, tokenizer.bos_token_id, skip
        if texts.prose_share is None or texts.prose_share >= 1:
            return Windows(*windows)
        mix = MixOptions(0, [], 0, texts.prose_share, texts.answer_weight, optimisation.seed)
        return FactMix(*windows, Facts(tokenizer, stream[stream != tokenizer.eos_token_id]), mix)
    prose_share = LEDGER_PROSE if texts.prose_share is None else texts.prose_share
    sizes = [f"{texts.sequence}x0"], rows * texts.sequence, prose_share, texts.answer_weight
    return Mix(stream, ledger, MixOptions(n_items, *sizes, optimisation.seed), skip)


def load_stream(data: Path, tokenizer, n_tokens: int) -> np.ndarray:
    """A file, or all .txt files of a folder, as one stream of token ids `[n]`, the end marked after each.

    Args:
        n_tokens: that will be read; of longer texts the middle of every file is enough, or of some files.

    Raises:
        FileNotFoundError: there is none.
    """
    texts = read_texts(data)
    n_characters = CHARACTERS * n_tokens
    texts = _some(texts, n_characters)
    share = min(1.0, n_characters / max(1, sum(map(len, texts))))
    cuts = [(len(text) - int(len(text) * share)) // 2 for text in texts]
    texts = [text[cut : len(text) - cut] for text, cut in zip(texts, cuts, strict=True)]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.array([*text, *end], dtype=np.int32) for text in ids])


def _some(texts: list[str], n_characters: int) -> list[str]:
    """Texts that have so many characters together, `PIECE` of each or more; all texts if they have not."""
    n = max(min(n_characters // PIECE, len(texts)), 1)
    while True:
        chosen = [texts[i] for i in np.linspace(0, len(texts) - 1, n).round().astype(int)]
        if n == len(texts) or sum(map(len, chosen)) >= n_characters:
            return chosen
        n = min(2 * n, len(texts))


class Windows(torch.utils.data.Dataset):
    """Item `i` is a whole batch: packed windows of a stream of tokens, spread evenly, the same whenever asked for."""

    def __init__(self, stream: np.ndarray, length: int, n_rows: int, n: int, bos: int | None, skip: int | None):
        self.stream, self.length, self.n_rows, self.n, self.bos, self.skip = stream, length, n_rows, n, bos, skip

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(np.stack([self.row(i * self.n_rows + j) for j in range(self.n_rows)]))
        labels = ids[:, 1:]
        counts = torch.ones_like(labels) if self.skip is None else labels != self.skip
        return {"input_ids": ids[:, :-1], "labels": labels, "weights": counts.float() / counts.sum().clamp(min=1)}

    def row(self, i: int) -> np.ndarray:
        """`length + 1` token ids, so that `length` of them can be predicted."""
        start = place_of(i, len(self.stream) - self.length)
        ids = self.stream[start : start + self.length + 1].astype(np.int64)
        return ids if self.bos is None else np.concatenate([[self.bos], ids[:-1]])


class FactMix(Windows):
    """`Windows`, some of which are prompts with facts in them, and questions about all of these with their answers.

    The mean loss over all tokens has weight 1, the mean loss over answers `answer_weight`.

    Args:
        facts: makes the prompts.
        mix: shares, weights and seed.
    """

    def __init__(self, stream, length, n_rows, n, bos, skip, facts: Facts, mix: MixOptions):
        super().__init__(stream, length, n_rows, n, bos, skip)
        self.facts, self.mix = facts, mix

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        batch = super().__getitem__(i)
        is_answer = torch.zeros_like(batch["labels"], dtype=torch.bool)
        for j in range(self.n_rows):
            rng = np.random.default_rng([self.mix.seed, i, j])
            if rng.random() >= self.mix.prose_share:
                prompt = self.facts.sequence(self.length + 1, rng)
                batch["input_ids"][j], batch["labels"][j] = prompt.ids[:-1], prompt.ids[1:]
                is_answer[j] = prompt.is_answer[1:]
        counts = torch.ones_like(is_answer) if self.skip is None else batch["labels"] != self.skip
        weights = counts.float() / counts.sum().clamp(min=1)
        batch["weights"] = weights + self.mix.answer_weight * is_answer / is_answer.sum().clamp(min=1)
        return batch


@dataclass
class MixOptions:
    """What `LedgerMix` asks for."""

    steps: int
    curriculum: list[str]
    tokens_per_batch: int
    prose_share: float
    answer_weight: float
    seed: int


class Mix(LedgerMix):
    """`LedgerMix`, optionally without loss on the end of a text."""

    def __init__(self, stream, ledger, options: MixOptions, skip: int | None):
        super().__init__(stream, ledger, options)
        self.skip = skip

    def weigh(self, ids):
        batch = super().weigh(ids)
        if self.skip is not None:
            batch["weights"] = batch["weights"] * (batch["labels"] != self.skip)
        return batch
