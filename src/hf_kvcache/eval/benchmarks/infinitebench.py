"""InfiniteBench (Zhang et al. 2024, arXiv 2402.13718): twelve tasks over texts of 100,000 tokens and more.

Lengths of answers and scorers are the published ones. Prompts are worded anew, in the form of those for models that go
on with a text: what an answer begins with is given. What is asked stands behind the text throughout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from hf_kvcache.eval.benchmarks import scorers
from hf_kvcache.eval.benchmarks.datasets import Kind, from_template
from hf_kvcache.eval.benchmarks.loading import Origin
from hf_kvcache.eval.tasks.instances import Instance, Question

PAPER = "Zhang et al. 2024, arXiv 2402.13718"
_OPTIONS = "\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n"


@dataclass(frozen=True)
class Prompted:
    """A task of InfiniteBench.

    Attributes:
        prompt: with `{context}`, and `{input}`, `{call}` or options as fields.
        prefix: what an answer begins with.
        score: of an answer.
        n_new: tokens of an answer.
    """

    summary: str
    prompt: str
    prefix: str
    score: scorers.Score
    n_new: int


SETS = {
    "passkey": Prompted(
        "a pass key in sentences that repeat",
        "Something important is hidden in a long text that does not matter. Find it and keep it in mind: I will ask "
        "you for it afterwards.\n\n{context}\n\n{input}",
        "\n\nThe pass key is",
        scorers.first_digits,
        6,
    ),
    "number_string": Prompted(
        "a number with repeated digits, in sentences that repeat",
        "Something important is hidden in a long text that does not matter. Find it: I will ask you for it afterwards."
        "\n\n{context}\n\n{input}",
        "\n\nThe sequence of digits is",
        scorers.first_digits,
        12,
    ),
    "kv_retrieval": Prompted(
        "the value of a key in a JSON object",
        "Find the value that belongs to a key in the JSON object below.\n\n{context}\n\n{input}",
        "",
        scorers.one_word,
        50,
    ),
    "longbook_sum_eng": Prompted(
        "a summary of a novel",
        "A book follows. Summarise it.\n\n{context}\n\nSummary:",
        "",
        scorers.rouge_l_sum,
        1200,
    ),
    "longbook_choice_eng": Prompted(
        "a question about a novel, with four choices",
        "A book follows. Answer the question behind it.\n\n{context}\n\nQuestion: {input}" + _OPTIONS,
        "\nThe letter of the right answer is",
        scorers.choice,
        40,
    ),
    "longbook_qa_eng": Prompted(
        "a question about a novel",
        "A book follows. Answer the question behind it in as few words as you can.\n\n{context}\n\nQuestion: {input}\n"
        "Answer:",
        "",
        scorers.qa_f1,
        40,
    ),
    "longbook_qa_chn": Prompted(
        "a question about a novel in Chinese",
        "请先阅读下面的书，再回答问题。\n\n{context}\n\n问题：{input}\n答案：",
        "",
        scorers.qa_f1_zh,
        40,
    ),
    "longdialogue_qa_eng": Prompted(
        "who a speaker in a script is",
        'In the script below one name of a character has been replaced with "$$MASK$$". Try to find out who it is.\n\n'
        "{context}\n\nWhich name stood in the place of $$MASK$$?",
        " The name in the place of $$MASK$$ is likely",
        scorers.one_name,
        40,
    ),
    "math_find": Prompted(
        "a number such as the largest one of a list",
        "A list of numbers follows. I will ask you for one of them.\n\n{context}\n\n{input}",
        "",
        scorers.first_number,
        3,
    ),
    "math_calc": Prompted(
        "all values on the way through a long sum",
        "Work out the values on the way through an expression.\n\nExpression: 2 + 5 - 3\nValues: [2, 7, 4]\n\n"
        "Expression: 9 - 4 + 1 - 8\nValues: [9, 5, 6, -2]\n\nExpression: {context}\nValues:",
        "",
        scorers.first_numbers,
        30_000,
    ),
    "code_run": Prompted(
        "what a function of many returns",
        "Python functions follow, which call each other.\n\n{context}\n\nWhat is the exact value of {call}?",
        " The value of {call} is",
        scorers.last_integer,
        5,
    ),
    "code_debug": Prompted(
        "which function has a mistake",
        "Python code follows. One of its functions has been given a mistake that makes it crash.\n\n{context}\n\nWhich "
        "one is it?" + _OPTIONS,
        "\nThe correct option is:",
        scorers.function,
        5,
    ),
}


def ask(row: dict, prompted: Prompted) -> Iterator[Instance]:
    """The instance of a row."""
    fields = {"input": row["input"].strip(), **dict(zip("ABCD", row.get("options") or ()))}
    if "{call}" in prompted.prompt:
        fields["call"] = re.search(r"func_[0-9]+\(-?[0-9]+\)", row["input"])[0]
    question = Question("", answers(row), prompted.prefix.format(**fields), prompted.n_new)
    yield from_template(prompted.prompt, row["context"], question, **fields)


def answers(row: dict) -> tuple[str, ...]:
    """What is right: strings and numbers as they are written, of a choice the option and its letter."""
    found = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    found = [str(one) for one in found]
    options = row.get("options") or []
    if options and not (len(found) == 2 and found[1] in "ABCD"):
        found = [found[0], "ABCD"[[str(option) for option in options].index(found[0])]]
    return tuple(found)


def kinds() -> Iterator[Kind]:
    """All tasks."""
    for name, prompted in SETS.items():
        origin = Origin("xinrongzhang2022/InfiniteBench", f"{name}.jsonl")
        yield Kind(
            f"infinitebench:{name}", prompted.summary, origin, partial(ask, prompted=prompted), prompted.score, PAPER
        )
