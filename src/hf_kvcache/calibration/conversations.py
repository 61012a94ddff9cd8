"""Conversations as prompts and answers."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from hf_kvcache.calibration.prompts import Prompt

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Conversations(torch.utils.data.Dataset):
    """Conversations, in the tokenizer's chat template if it has one; the last answer is the answer.

    Args:
        rows: `{"instruction": ..., "output": ...}` (LongAlpaca) or `{"conversations": [{"from", "value"}, ...]}`
            (ShareGPT); rows without an answer are left out.
        prompt_tokens: longer prompts lose their middle, so that the question stays whether it comes first or last.
        answer_tokens: longer answers lose their end.

    Raises:
        ValueError: not one row is a conversation.
    """

    def __init__(self, rows: list[dict], tokenizer, prompt_tokens: int, answer_tokens: int):
        self.tokenizer, self.prompt_tokens, self.answer_tokens = tokenizer, prompt_tokens, answer_tokens
        self.talks = [talk for talk in map(messages_of, rows) if talk is not None]
        if not self.talks:
            raise ValueError('no row is {"instruction", "output"} or {"conversations": [{"from", "value"}, ...]}')

    def __len__(self) -> int:
        return len(self.talks)

    def __getitem__(self, i: int) -> Prompt:
        *before, last = self.talks[i]
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False)
            # templates write what opens a text themselves
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer("".join(message["content"] + "\n" for message in before))["input_ids"]
        if len(ids) > self.prompt_tokens:
            n_tail = self.prompt_tokens // 2
            ids = ids[: self.prompt_tokens - n_tail] + ids[len(ids) - n_tail :]
        answer = self.tokenizer(last["content"], add_special_tokens=False)["input_ids"][: self.answer_tokens]
        ids = torch.tensor(ids)
        return Prompt(ids, ids, torch.tensor(answer))


def messages_of(row: dict) -> list[dict[str, str]] | None:
    """A row as chat messages up to its last answer; None if that is empty, or there is nothing before it."""
    if "conversations" in row:
        said = [(ROLES.get(turn.get("from")), turn.get("value")) for turn in row["conversations"]]
    else:
        asked = "\n".join(filter(None, [row.get("instruction"), row.get("input")]))
        said = [("user", asked), ("assistant", row.get("output"))]
    messages = [{"role": role, "content": text} for role, text in said if role and text]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return messages if any(message["role"] == "user" for message in messages[:-1]) else None


def read_rows(path: str | Path) -> list[dict] | None:
    """The rows of a JSON or JSON Lines file; None for any other file, which is plain text."""
    path = Path(path)
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    return None
