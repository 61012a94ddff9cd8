"""Windows of texts: what is read and compressed, and what follows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np
import torch


@dataclass(frozen=True)
class Windows:
    """Windows of texts, none of which overlap.

    The first window of every text comes before the second of any, in an order within each text that is drawn from the
    seed, so that beginnings of books are nothing special.

    Attributes:
        tokenizer: of the model.
        texts: the texts.
        seed: of the order.
    """

    tokenizer: object
    texts: tuple[str, ...]
    seed: int = 0

    def places(self, n_tokens: int) -> list[tuple[int, int]]:
        """All windows of `n_tokens` tokens: number of the text, and where they begin in it."""
        head = len(self._head)
        found: list[tuple[int, int, int]] = []
        for i, ids in enumerate(self._ids):
            n = len(ids) // (n_tokens - head)
            order = np.random.default_rng([self.seed, n_tokens, i]).permutation(n)
            found += [(rank, i, int(k) * (n_tokens - head)) for rank, k in enumerate(order)]
        return [(i, start) for _, i, start in sorted(found)]

    def window(self, number: int, n_tokens: int) -> list[int]:
        """Token ids of window `number`, the tokenizer's beginning of a text included where it has one."""
        i, start = self.places(n_tokens)[number]
        return self._head + self._ids[i][start : start + n_tokens - len(self._head)]

    def about(self) -> dict:
        """What the windows depend on, beside their sizes."""
        return {"n": len(self.texts), "sha256": sha256("\0".join(self.texts).encode("utf-8")).hexdigest()}

    @property
    def _head(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [] if bos is None else [bos]

    @cached_property
    def _ids(self) -> list[list[int]]:
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.texts]


def in_steps(windows: torch.Tensor, n_context: int, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What is fed behind the context, and what is to be predicted from it, `step` tokens at a time.

    Args:
        windows: token ids `[B, n]`; the last one is predicted only.
    """
    last = windows.shape[1] - 1
    for start in range(n_context, last, step):
        stop = min(start + step, last)
        yield windows[:, start:stop], windows[:, start + 1 : stop + 1]
