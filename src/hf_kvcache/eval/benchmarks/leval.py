"""L-Eval (An et al. 2023, arXiv 2307.11088): seven closed-ended data sets and thirteen open-ended ones.

Every row is a text with several questions. Lengths of answers and scorers are the published ones, and open-ended
questions say how many words the reference has, as published; prompts are worded anew. What only people or another model
can judge is left out. Of `sci_fi` what the text says is asked, not what the world outside it says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from hf_kvcache.eval.benchmarks import leval_scorers, scorers
from hf_kvcache.eval.benchmarks.datasets import Kind, from_template
from hf_kvcache.eval.benchmarks.loading import Origin
from hf_kvcache.eval.tasks.instances import Instance, Question

PAPER = "An et al. 2023, arXiv 2307.11088"
N_NEW = 512


@dataclass(frozen=True)
class Asked:
    """A data set of L-Eval.

    Attributes:
        prompt: with `{context}`, `{input}` and, for the words of the reference, `{n}`.
        score: of an answer.
        by: how its questions are marked that are scored so: "exam", "f1" or "rouge".
        is_plain: whether it is read without a chat template, as published.
    """

    summary: str
    prompt: str
    score: scorers.Score
    by: str = "exam"
    is_plain: bool = False


_DIRECTLY = "\n\nQuestion: {input}\n\nSay the answer and nothing else.\nAnswer:"
_LETTER = "A long document follows. One of the options is right: answer with its letter alone.\n\n{context}" + _DIRECTLY
_OPEN = (
    "A long document follows. Do what you are told behind it.\n\n{context}\n\nInstruction: {input}\nUse {n} words for "
    "your answer."
)

SETS = {
    "coursera": Asked(
        "a question about a lecture, with one right option or several",
        "A long document follows. One option or several are right: answer with their letters alone, such as A or AB."
        "\n\n{context}" + _DIRECTLY,
        leval_scorers.every_letter,
    ),
    "gsm100": Asked(
        "a problem of numbers, after sixteen examples",
        "Questions and answers follow. Answer the last one in the same way. End with: The answer is (number).\n\n"
        "{context}\n\n{input}",
        leval_scorers.final_number,
        is_plain=True,
    ),
    "quality": Asked("a question about a story, with four options", _LETTER, leval_scorers.first_letter),
    "tpo": Asked("a question about a lecture, with options", _LETTER, leval_scorers.first_letter),
    "topic_retrieval_longchat": Asked(
        "the first, second or third topic of a conversation",
        "A record of our conversation follows. I am USER, you are ASSISTANT. Each topic begins with the words 'I would "
        "like to discuss the topic of'. I will ask you for topics afterwards.\n\n{context}\n\n{input}",
        leval_scorers.contained,
    ),
    "codeU": Asked(
        "what a call of a function prints",
        "Functions with comments follow. I will ask you what calls of some of them give.\n\n{context}\n\n{input}",
        leval_scorers.code_output,
    ),
    "sci_fi": Asked(
        "whether a sentence is true in a story",
        "A story of science fiction follows. Say whether a sentence is True or False by what stands in the story, not "
        "by what you know.\n\n{context}" + _DIRECTLY,
        leval_scorers.truth,
    ),
    "financial_qa": Asked("a question about a conference call", _OPEN, scorers.qa_f1, "f1"),
    "legal_contract_qa": Asked("a clause of a contract", _OPEN, scorers.qa_f1, "f1"),
    "multidoc_qa": Asked("a question about several documents", _OPEN, scorers.qa_f1, "f1"),
    "narrative_qa": Asked("a question about a novel or a script", _OPEN, scorers.qa_f1, "f1"),
    "natural_question": Asked("a question about pages of Wikipedia", _OPEN, scorers.qa_f1, "f1"),
    "scientific_qa": Asked("a question about a scientific article", _OPEN, scorers.qa_f1, "f1"),
    "gov_report_summ": Asked("a summary of a report", _OPEN, scorers.rouge_l, "rouge"),
    "meeting_summ": Asked("a summary of a part of a meeting", _OPEN, scorers.rouge_l, "rouge"),
    "news_summ": Asked("a summary of news", _OPEN, scorers.rouge_l, "rouge"),
    "paper_assistant": Asked("a section of a paper", _OPEN, scorers.rouge_l, "rouge"),
    "patent_summ": Asked("a summary of a patent", _OPEN, scorers.rouge_l, "rouge"),
    "review_summ": Asked("a summary of reviews", _OPEN, scorers.rouge_l, "rouge"),
    "tv_show_summ": Asked("a summary of a scene", _OPEN, scorers.rouge_l, "rouge"),
}


def ask(row: dict, asked: Asked) -> Iterator[Instance]:
    """An instance for every question of a row that `asked.score` is for."""
    if row["evaluation"] != asked.by:
        return
    for instruction, output in zip(row["instructions"], row["outputs"], strict=True):
        question = Question("", (output,), "", N_NEW)
        fields = {"input": instruction, "n": str(len(output.split()))}
        yield from_template(asked.prompt, row["input"], question, asked.is_plain, **fields)


def kinds() -> Iterator[Kind]:
    """All data sets."""
    for name, asked in SETS.items():
        folder = "Exam" if asked.by == "exam" else "Generation"
        origin = Origin("L4NLP/LEval", f"LEval/{folder}/{name}.jsonl")
        yield Kind(f"leval:{name}", asked.summary, origin, partial(ask, asked=asked), asked.score, PAPER)
