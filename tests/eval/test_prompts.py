"""Pieces of prompts against what tokenising the whole would give."""

import pytest
from transformers import AutoTokenizer

from hf_kvcache.eval.prompts import Prompter
from hf_kvcache.eval.tasks.instances import Instance, Question
from hf_kvcache.models import embedded_model

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>{% endif %}"
    "{% endif %}"
)
QUESTIONS = (Question("\nWhat is the first number?", ("7",), " It is"), Question("\nAnd the second? ", ("8",)))
INSTANCE = Instance("Remember the numbers.\n", "One is 7. Two is 8.", QUESTIONS)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture
def chatty(tokenizer):
    tokenizer.chat_template = CHATML
    return tokenizer


def test_plain_pieces_are_the_whole(tokenizer):
    prompt = Prompter(tokenizer).prompt(INSTANCE)
    text = "Remember the numbers.\nOne is 7. Two is 8.\n"
    for ids, asked in zip(prompt.questions, ("What is the first number? It is", "And the second? "), strict=True):
        assert prompt.context + ids == tokenizer(text + asked)["input_ids"]
    assert prompt.context == tokenizer(text)["input_ids"] and prompt.context[0] == tokenizer.bos_token_id
    assert tokenizer.decode(prompt.turns[0]) == "\nAnd the second? " and len(prompt.turns) == 1


def test_pieces_of_a_template_are_the_whole(chatty):
    prompt = Prompter(chatty).prompt(INSTANCE)
    for ids, question in zip(prompt.questions, QUESTIONS, strict=True):
        said = [{"role": "user", "content": f"Remember the numbers.\nOne is 7. Two is 8.{question.text.rstrip()}"}]
        text = chatty.apply_chat_template(said, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        assert prompt.context + ids == chatty(text + question.prefix.strip(), add_special_tokens=False)["input_ids"]
    # one token for the beginning of the text, not two, and the question is not read with the context
    assert prompt.context.count(chatty.bos_token_id) == 1
    assert chatty.decode(prompt.context).endswith("Two is 8.\n")


def test_a_further_turn_ends_the_answer_and_begins_the_next(chatty):
    prompt = Prompter(chatty).prompt(INSTANCE)
    expected = "<|im_end|>\n<|im_start|>user\nAnd the second?<|im_end|>\n<|im_start|>assistant\n<think>"
    assert chatty.decode(prompt.turns[0]) == expected
    assert prompt.n_tokens("turns") == sum(map(len, (prompt.context, prompt.questions[0], prompt.turns[0])))
    assert prompt.n_tokens("known") == len(prompt.context) + max(map(len, prompt.questions))


def test_a_template_can_be_left_out(chatty):
    assert "im_start" not in chatty.decode(Prompter(chatty, uses_template=False).prompt(INSTANCE).context)


def test_a_template_that_changes_the_text_is_refused(tokenizer):
    tokenizer.chat_template = CHATML.replace("| trim", "| upper")
    with pytest.raises(ValueError, match="changes the text of the user.*--no-chat-template"):
        Prompter(tokenizer).prompt(INSTANCE)


def test_a_token_across_the_border_is_split():
    class Pairs:
        """A tokenizer that joins any two letters, so that a border at an odd place is inside of a token."""

        bos_token_id = chat_template = None

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [hash(text[i : i + 2]) for i in range(0, len(text), 2)]}

    tokenizer = Pairs()
    prompt = Prompter(tokenizer).prompt(Instance("", "odd", (Question("ask", ()), Question("\nwhy", ()))))
    for ids, text in zip(prompt.questions, ("ask", "\nwhy"), strict=True):
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_what_a_template_adds_is_counted(chatty, tokenizer):
    for prompter in (Prompter(chatty), Prompter(tokenizer, uses_template=False)):
        prompt = prompter.prompt(INSTANCE)
        parts = INSTANCE.instruction, INSTANCE.context, QUESTIONS[1].text
        assert prompter.n_added() == pytest.approx(
            len(prompt.context + prompt.questions[1]) - sum(map(prompter.count, parts)), abs=2
        )
