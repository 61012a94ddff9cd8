"""Prompts with their answers, and batches of them, for training what has to know which tokens will be looked at."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_kvcache.calibration.judging import Text

REQUEST = "Repeat the previous context exactly."  # KVzip's words


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        ids: token ids `[T]`, what opens a text of the model included.
        query: the question in it, or about it; empty where nothing is asked `[n]`.
        answer: what follows; the questions too where several are asked in turn `[A]`.
    """

    ids: torch.Tensor
    query: torch.Tensor
    answer: torch.Tensor


@dataclass(frozen=True)
class Arrange:
    """Collate prompts into a `Text`.

    Args:
        judged_by: "answer" puts the answer after the prompt, "repeat" a request to repeat it and the prompt once more,
            "prompt" nothing.
        request: token ids of that request.
        bos: id that opens a text; it stays first.
        n_query: this many last tokens of the query are put before the prompt, as a part of it (Locret-Q).
    """

    judged_by: str
    request: torch.Tensor | None = None
    bos: int | None = None
    n_query: int = 0

    def __call__(self, prompts: list[Prompt]) -> Text:
        heads = [self._prompt(prompt) for prompt in prompts]
        tails, n_between = [prompt.answer for prompt in prompts], 0
        if self.judged_by == "repeat":
            n_between = len(self.request)
            tails = [torch.cat([self.request, ids[self._n_bos(ids) :]]) for ids in heads]
        elif self.judged_by == "prompt":
            tails = [ids[:0] for ids in heads]
        n_prompt, n_tail = max(map(len, heads)), max(map(len, tails))
        ids = heads[0].new_zeros(len(prompts), n_prompt + n_tail)
        is_real = torch.zeros_like(ids, dtype=torch.bool)
        for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
            columns = slice(n_prompt - len(head), n_prompt + len(tail))
            ids[row, columns], is_real[row, columns] = torch.cat([head, tail]), True
        return Text(ids, None if is_real.all() else is_real, n_prompt, n_tail - n_between)

    def _n_bos(self, ids: torch.Tensor) -> int:
        return int(self.bos is not None and len(ids) > 0 and ids[0] == self.bos)

    def _prompt(self, prompt: Prompt) -> torch.Tensor:
        if not self.n_query:
            return prompt.ids
        n = self._n_bos(prompt.ids)
        return torch.cat([prompt.ids[:n], prompt.query[-self.n_query :], prompt.ids[n:]])


def request_to_repeat(tokenizer) -> torch.Tensor:
    """Token ids of what asks a model to repeat its prompt: a turn of the user where there is a chat template."""
    text = f"\n\n{REQUEST}\n\n"
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": REQUEST}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        text = text.removeprefix(tokenizer.bos_token or "")
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
