"""LongBench v2 (Bai et al. 2024, arXiv 2412.15204): 503 questions with four choices, also by length of their texts.

The form of the answer, by which the scorer finds it, and its length are the published ones; the prompt is worded anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from hf_kvcache.eval.benchmarks import scorers
from hf_kvcache.eval.benchmarks.datasets import Kind, from_template
from hf_kvcache.eval.benchmarks.loading import Origin
from hf_kvcache.eval.tasks.instances import Instance, Question

PAPER = "Bai et al. 2024, arXiv 2412.15204"
PROMPT = (
    "Read the text below, and answer the question behind it.\n\n<text>\n{context}\n</text>\n\nWhich is the right "
    "answer to this question: {question}\n(A) {choice_A}\n(B) {choice_B}\n(C) {choice_C}\n(D) {choice_D}\n\nAnswer in "
    'this form: "The correct answer is (letter)".'
)
LENGTHS = {"": "all", ":short": "up to 32,000 words", ":medium": "32,000 to 128,000 words", ":long": "more"}


def ask(row: dict, length: str) -> Iterator[Instance]:
    """The instance of a row, if its text is of that length."""
    if length in ("", f":{row['length']}"):
        fields = {name: row[name].strip() for name in ("question", *(f"choice_{letter}" for letter in "ABCD"))}
        yield from_template(PROMPT, row["context"].strip(), Question("", (row["answer"],), "", 128), **fields)


def kinds() -> Iterator[Kind]:
    """All of it, and three parts."""
    origin = Origin("zai-org/LongBench-v2", "data.json")
    for length, said in LENGTHS.items():
        summary = f"a question with four choices, texts of {said}" if length else "a question with four choices"
        yield Kind(f"longbench_v2{length}", summary, origin, partial(ask, length=length), scorers.letter, PAPER)
