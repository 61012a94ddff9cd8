"""Scorers of LongBench, LongBench v2 and InfiniteBench after their definitions: `score(answer, question)`, 0 to 1.

Of several right answers the best one counts, as published.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import SequenceMatcher
from functools import wraps

from hf_kvcache.eval.benchmarks import rouge, words
from hf_kvcache.eval.tasks.instances import Question

Score = Callable[[str, Question], float]


def best(score: Callable[[str, str], float]) -> Score:
    """A scorer of pairs of texts as one of answers to questions."""

    @wraps(score)
    def scored(answer: str, question: Question) -> float:
        return float(max(score(answer, expected) for expected in question.answers))

    return scored


qa_f1 = best(words.qa_f1)
qa_f1_zh = best(words.qa_f1_zh)
rouge_l = best(rouge.rouge_l)
rouge_l_sum = best(rouge.rouge_l_sum)
rouge_l_distinct = best(rouge.rouge_l_distinct)


@best
def rouge_l_distinct_zh(answer: str, expected: str) -> float:
    """`rouge_l_distinct` of characters; published with words of the segmenter jieba."""
    return rouge.rouge_l_distinct(*(" ".join("".join(text.split())) for text in (answer, expected)))


def first_line(score: Score) -> Score:
    """Score the first line alone: of what few-shot examples make a model go on with (LongBench)."""

    @wraps(score)
    def scored(answer: str, question: Question) -> float:
        return score(answer.lstrip("\n").split("\n")[0], question)

    return scored


def classification(answer: str, question: Question) -> float:
    """Share of the right class in all classes that are named; such as are a part of the right one's name do not count.

    `question.choices` are all classes (LongBench).
    """
    named = [choice for choice in question.choices if choice in answer]
    right = question.answers[0]
    # published with a list that shrinks while it is gone through, so that the one behind a dropped one stays
    kept, i = list(named), 0
    while i < len(kept):
        if kept[i] in right and kept[i] != right:
            kept.remove(kept[i])
        i += 1
    return 1 / len(kept) if right in kept else 0.0


@best
def right_numbers(answer: str, expected: str) -> float:
    """Share of the right number in all numbers of an answer (LongBench's counts and retrieved paragraphs)."""
    right, numbers = re.search(r"\d+", expected)[0], re.findall(r"\d+", answer)
    return numbers.count(right) / len(numbers) if numbers else 0.0


@best
def code_similarity(answer: str, expected: str) -> float:
    """Similarity of the first line that is no comment, in hundredths (LongBench; `fuzz.ratio` over `difflib`)."""
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not re.search("`|#|//", line)), "")
    if line == expected:
        return 1.0
    return round(100 * SequenceMatcher(None, line, expected).ratio()) / 100 if line and expected else 0.0


def letter(answer: str, question: Question) -> float:
    """1 for the right letter behind "The correct answer is", in brackets or not (LongBench v2)."""
    said = answer.strip().replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", said) or re.search(r"The correct answer is ([A-D])", said)
    return float(found is not None and found[1] == question.answers[0])


# -- InfiniteBench ---------------------------------------------------------------------------------------------------


def first_digits(answer: str, question: Question) -> float:
    """1 if the first run of digits is the expected one."""
    found = re.search("[0-9]+", answer)
    return float(found is not None and found[0] == question.answers[0])


def one_word(answer: str, question: Question) -> float:
    """1 if the expected word is one of the words between blanks and marks."""
    return float(question.answers[0] in _parted(answer, "\n:\"'.,?!{}"))


def one_name(answer: str, question: Question) -> float:
    """1 if the first of the expected names is one of the words, in upper case."""
    return float(question.answers[0] in [word.upper() for word in _parted(answer, "\n:\"'.,?!{}")])


def last_integer(answer: str, question: Question) -> float:
    """1 if the last word is the expected whole number."""
    said = _parted(answer, "\n.`'\":")
    try:
        return float(bool(said) and int(said[-1]) == int(question.answers[0]))
    except ValueError:
        return 0.0


def first_number(answer: str, question: Question) -> float:
    """1 if the first number, with decimals or without, is the expected one; decimals do not count for whole numbers."""
    found = re.search(r"\d+\.\d+|\d+", answer)
    if found is None:
        return 0.0
    expected = question.answers[0]
    if "." in expected:
        return float(float(found[0]) == float(expected))
    try:
        return float(int(found[0]) == int(expected))
    except ValueError:
        # published, this ends the run; a number with decimals is no whole number
        return 0.0


def first_numbers(answer: str, question: Question) -> float:
    """Share of the expected whole numbers that come one after the other from the start; signs do not count."""
    n_right = 0
    for said, expected in zip(re.findall("[0-9]+", answer), question.answers):
        if int(said) != int(expected):
            break
        n_right += 1
    return n_right / len(question.answers)


def choice(answer: str, question: Question) -> float:
    """1 for the right letter or option: at the start, else behind words such as "answer is", else the first letter.

    `question.answers` are the option and its letter.
    """
    said = answer.strip()
    if not said:
        return 0.0
    if said[0] in "ABCD":
        return float(said[0] in question.answers)
    if said in question.answers:
        return 1.0
    said = _blanked(said, "\n\"'.,?!{}")
    for begin in ("answer is:", "answer:", "answer is", "option is"):
        if (found := _behind(said, begin)) is not None:
            return float(found.startswith(question.answers))
    letters = (word for word in said.split() if word in "ABCD")
    return float(next(letters, None) in question.answers)


def function(answer: str, question: Question) -> float:
    """1 for the right letter at the start, or for it or the function's name behind words such as "answer is".

    `question.answers` are the function and its letter.
    """
    said = answer.strip()
    name, right = question.answers
    if said[:2] in (f"{right}.", f"{right}:"):
        return 1.0
    said = re.sub("Option|option", " ", said)
    said = _blanked(said, "\n`'\"-*")
    for begin in ("answer is:", "is:", "answer:", "correct option is:"):
        if (found := _behind(said, begin)) is not None:
            return float(found.startswith((right, name)))
    return 0.0


def _parted(text: str, marks: str) -> list[str]:
    """Words of a text whose marks became blanks."""
    return text.translate(str.maketrans(marks, " " * len(marks))).split()


def _blanked(text: str, marks: str) -> str:
    """A text whose marks became blanks, of which no two follow each other."""
    return re.sub(" {2,}", " ", text.translate(str.maketrans(marks, " " * len(marks))))


def _behind(text: str, begin: str) -> str | None:
    """What stands one character behind the first `begin`; None where there is none."""
    _, found, rest = text.partition(begin)
    return rest[1:] if found else None
