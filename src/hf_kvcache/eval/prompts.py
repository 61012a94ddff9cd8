"""Instances of tasks as token ids, in pieces: what is read first, and what is asked of it afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from os.path import commonprefix

from hf_kvcache.eval.tasks.instances import Instance, Question

# stands for an answer while a template says what follows one
_ANSWER = "ANSWER-OF-THE-MODEL"
# some templates write today's date into their system prompt, and think aloud unless told not to
_TEMPLATE = {"enable_thinking": False, "date_string": "01 Jan 2025"}


@dataclass(frozen=True)
class Prompt:
    """Token ids of one instance: `context + questions[i]` is the prompt of its question `i`.

    Attributes:
        context: everything before the question, the beginning of the user's turn included.
        questions: for every question all that stands between the context and the answer.
        turns: for every question but the first all that stands between the answer before it and its own.
    """

    context: list[int]
    questions: list[list[int]]
    turns: list[list[int]]

    def n_tokens(self, setting: str) -> int:
        """Tokens of the longest prompt in a setting, without answers."""
        if setting == "turns":
            return len(self.context) + len(self.questions[0]) + sum(map(len, self.turns))
        return len(self.context) + max(map(len, self.questions))


class Prompter:
    """Makes prompts for one tokenizer.

    Instruction, context and question follow each other as they are, in one turn of the user where there is a template;
    the prefix of the answer begins the assistant's turn. Line feeds that all questions begin with are read with the
    context: tokenizers join them to what stands before.

    Args:
        tokenizer: of the model.
        uses_template: whether to use its chat template, where it has one.
    """

    def __init__(self, tokenizer, uses_template: bool = True):
        self.tokenizer = tokenizer
        self.has_template = uses_template and getattr(tokenizer, "chat_template", None) is not None

    def prompt(self, instance: Instance) -> Prompt:
        """The pieces of an instance.

        Raises:
            ValueError: the chat template changes what the user says, so that the context cannot be found in it.
        """
        breaks = commonprefix([q.text[: len(q.text) - len(q.text.lstrip("\n"))] for q in instance.questions])
        told = (instance.instruction + instance.context).lstrip() + breaks
        templated = self.has_template and not instance.is_plain
        asked = [question.text.removeprefix(breaks) for question in instance.questions]
        pairs = [self._texts(told, *pair, templated) for pair in zip(instance.questions, asked)]
        before = pairs[0][0]
        bos = [] if templated or self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        context = self._encode(before)
        questions = [self._follow(context, before, after) for _, after in pairs]
        turns = [self._encode(self._turn(question, templated)) for question in instance.questions[1:]]
        return Prompt(bos + context, questions, turns)

    def count(self, text: str) -> int:
        """Tokens of a text by itself."""
        return len(self._encode(text))

    def n_added(self) -> int:
        """Tokens that stand in a prompt beside those of instruction, context and question."""
        prompt = self.prompt(Instance("a\n", "a\n", (Question("a", ()),)))
        return prompt.n_tokens("known") - 2 * self.count("a\n") - self.count("a")

    def _texts(self, told: str, question: Question, asked: str, templated: bool) -> tuple[str, str]:
        """What stands before the question, and from it to the answer."""
        if not templated:
            return told, asked + question.prefix
        content = told + asked.rstrip()
        start, found, end = self._render([{"role": "user", "content": content}]).partition(content)
        if not found:
            raise ValueError("the chat template changes the text of the user: leave it out (--no-chat-template)")
        return start + told, asked.rstrip() + end + question.prefix.strip()

    def _turn(self, question: Question, templated: bool) -> str:
        """What stands between an answer and the next one."""
        if not templated:
            break_ = "" if question.text.startswith("\n") else "\n"
            return break_ + question.text + question.prefix
        said = ("user", "a"), ("assistant", _ANSWER), ("user", question.text.strip())
        rendered = self._render([{"role": role, "content": content} for role, content in said])
        return rendered.rpartition(_ANSWER)[2] + question.prefix.strip()

    def _render(self, messages: list[dict]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **_TEMPLATE)

    def _follow(self, head: list[int], before: str, after: str) -> list[int]:
        """Ids of `after`, so that both pieces are what the tokenizer makes of the whole wherever that is possible."""
        whole = self._encode(before + after)
        return whole[len(head) :] if whole[: len(head)] == head else self._encode(after)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
