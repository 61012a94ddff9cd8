"""LongBench (Bai et al. 2023, arXiv 2308.14508): 21 data sets in English and Chinese, and 13 of even lengths (`_e`).

Lengths of answers and scorers are the published ones, prompts are worded anew in the same order: instruction, text,
question. Where the published `dataset2prompt.json` lies beside the data, it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from hf_kvcache.eval.benchmarks import scorers
from hf_kvcache.eval.benchmarks.datasets import Kind, from_template
from hf_kvcache.eval.benchmarks.loading import Origin
from hf_kvcache.eval.tasks.instances import Instance, Question

PAPER = "Bai et al. 2023, arXiv 2308.14508"
PROMPTS = "dataset2prompt.json"


@dataclass(frozen=True)
class Prompted:
    """A data set of LongBench.

    Attributes:
        prompt: with `{context}` and `{input}`.
        score: of an answer.
        n_new: tokens of an answer.
        is_plain: whether it is read without a chat template, as published.
    """

    summary: str
    prompt: str
    score: scorers.Score
    n_new: int
    is_plain: bool = False


_PASSAGES = (
    "Several passages follow. Answer a question from them with the answer alone.\n\n{context}\n\nAnswer from the "
    "passages above. Say the answer and nothing else.\n\nQuestion: {input}\nAnswer:"
)
_CODE = "Go on with the code below by one line.\n{context}{input}Next line of code:\n"

SETS = {
    "narrativeqa": Prompted(
        "a question about a novel or a script",
        "A story follows. Answer a question about it in a single phrase, if possible, and explain nothing.\n\n"
        "Story: {context}\n\nAnswer the question about the story above in a single phrase, if possible, and explain "
        "nothing.\n\nQuestion: {input}\n\nAnswer:",
        scorers.qa_f1,
        128,
    ),
    "qasper": Prompted(
        "a question about a scientific article",
        'A scientific article follows. Answer a question about it in a phrase or a sentence: "yes" or "no" where that '
        'is asked, "unanswerable" where the article does not tell.\n\nArticle: {context}\n\nAnswer the question about '
        'the article above in a phrase or a sentence, with "yes" or "no" where that is asked, and with '
        '"unanswerable" where the article does not tell. Explain nothing.\n\nQuestion: {input}\n\nAnswer:',
        scorers.qa_f1,
        128,
    ),
    "multifieldqa_en": Prompted(
        "a question about an article",
        "Read the text below, and answer briefly.\n\n{context}\n\nAnswer the question about the text above. Say the "
        "answer and nothing else.\n\nQuestion: {input}\nAnswer:",
        scorers.qa_f1,
        64,
    ),
    "multifieldqa_zh": Prompted(
        "a question about an article in Chinese (F1 of characters; published: of words)",
        "请阅读下面的文章，然后用中文简短地回答。\n\n{context}\n\n请根据上面的文章回答问题，只写答案。\n\n问题：{input}\n回答：",
        scorers.qa_f1_zh,
        64,
    ),
    "hotpotqa": Prompted("a question that takes two passages", _PASSAGES, scorers.qa_f1, 32),
    "2wikimqa": Prompted("a question that takes two passages or more", _PASSAGES, scorers.qa_f1, 32),
    "musique": Prompted("a question that takes two to four passages", _PASSAGES, scorers.qa_f1, 32),
    "dureader": Prompted(
        "a question about pages in Chinese (ROUGE-L of characters; published: of words)",
        "请根据所给的文章回答问题。\n\n文章：{context}\n\n请根据上面的文章回答下面的问题。\n\n问题：{input}\n回答：",
        scorers.rouge_l_distinct_zh,
        128,
    ),
    "gov_report": Prompted(
        "a summary of a report",
        "A report of a government agency follows. Summarise it on one page.\n\nReport:\n{context}\n\nSummarise the "
        "report above on one page.\n\nSummary:",
        scorers.rouge_l_distinct,
        512,
    ),
    "qmsum": Prompted(
        "a question about a meeting",
        "The transcript of a meeting follows, and a query about it. Answer in one sentence or more.\n\nTranscript:\n"
        "{context}\n\nAnswer the query about the meeting above in one sentence or more.\n\nQuery: {input}\nAnswer:",
        scorers.rouge_l_distinct,
        512,
    ),
    "multi_news": Prompted(
        "a summary of several news passages",
        "Several news passages follow. Summarise all of them on one page.\n\nNews:\n{context}\n\nSummarise all the "
        "news above on one page.\n\nSummary:",
        scorers.rouge_l_distinct,
        512,
    ),
    "vcsum": Prompted(
        "a summary of a meeting in Chinese (ROUGE-L of characters; published: of words)",
        "请阅读下面的会议记录，然后写一段话总结会议内容。\n会议记录：\n{context}\n\n会议总结：",
        scorers.rouge_l_distinct_zh,
        512,
    ),
    "trec": Prompted(
        "the type of a question, after examples",
        "Say of which type the last question is. Examples come first.\n\n{context}\n{input}",
        scorers.first_line(scorers.classification),
        64,
        True,
    ),
    "triviaqa": Prompted(
        "a question about a passage, after examples",
        "Answer from the passage with the answer alone. Examples come first.\n\n{context}\n\n{input}",
        scorers.first_line(scorers.qa_f1),
        32,
        True,
    ),
    "samsum": Prompted(
        "a summary of a dialogue, after examples",
        "Summarise a dialogue in a few short sentences. Examples come first.\n\n{context}\n\n{input}",
        scorers.first_line(scorers.rouge_l_distinct),
        128,
        True,
    ),
    "lsht": Prompted(
        "the class of a piece of news in Chinese, after examples",
        "请判断最后一条新闻属于哪个类别。先给出一些例子。\n\n{context}\n{input}",
        scorers.first_line(scorers.classification),
        64,
        True,
    ),
    "passage_count": Prompted(
        "how many different paragraphs there are",
        "Paragraphs from Wikipedia follow, some of them more than once. Count the different ones.\n\n{context}\n\nHow "
        "many different paragraphs stand above, if each is counted once? Say the number alone: 1, 2, 3 or another.\n\n"
        "The number is: ",
        scorers.right_numbers,
        32,
    ),
    "passage_retrieval_en": Prompted(
        "which of thirty paragraphs a summary is of",
        "30 paragraphs from Wikipedia follow, and a summary of one of them. Say which one it is of.\n\n{context}\n\n"
        'The summary:\n\n{input}\n\nSay which paragraph it is of, in the form "Paragraph 1", "Paragraph 2".\n\n'
        "It is: ",
        scorers.right_numbers,
        32,
    ),
    "passage_retrieval_zh": Prompted(
        "which of several paragraphs in Chinese a summary is of",
        "下面有若干段落，以及其中一段的摘要。请判断摘要属于哪一段。\n\n{context}\n\n摘要：\n\n{input}\n\n"
        '请写出摘要所属段落的编号，格式为"段落1"、"段落2"。\n\n答案：',
        scorers.right_numbers,
        32,
    ),
    "lcc": Prompted("the next line of a file of code", _CODE, scorers.code_similarity, 64, True),
    "repobench-p": Prompted("the next line of code, with other files", _CODE, scorers.code_similarity, 64, True),
}
# those of which there are as many of every length
EVEN = (
    "qasper multifieldqa_en hotpotqa 2wikimqa gov_report multi_news trec triviaqa samsum passage_count "
    "passage_retrieval_en lcc repobench-p"
).split()


def ask(row: dict, prompted: Prompted) -> Iterator[Instance]:
    """The instance of a row."""
    question = Question("", tuple(row["answers"]), "", prompted.n_new, tuple(row["all_classes"] or ()))
    yield from_template(prompted.prompt, row["context"], question, prompted.is_plain, input=row["input"])


def kinds(published: dict | None = None) -> Iterator[Kind]:
    """All data sets.

    Args:
        published: prompts by data set that take the place of ours.
    """
    for suffix, names in (("", SETS), ("_e", EVEN)):
        for name in names:
            prompted = replace(SETS[name], prompt=(published or {}).get(name, SETS[name].prompt))
            summary = prompted.summary + (", as many of every length" if suffix else "")
            origin = Origin("zai-org/LongBench", f"data/{name}{suffix}.jsonl", "data.zip")
            full = f"longbench:{name}{suffix}"
            yield Kind(full, summary, origin, partial(ask, prompted=prompted), prompted.score, PAPER)
