"""How answers are scored: what of the expected strings stands in what a model said."""

from __future__ import annotations

import re

from hf_kvcache.eval.tasks.instances import Question


def string_match_all(answer: str, question: Question) -> float:
    """Share of the expected strings that an answer contains, in whatever case (RULER, arXiv 2404.06654)."""
    said = _plain(answer)
    return sum(expected.lower() in said for expected in question.answers) / len(question.answers)


def string_match_part(answer: str, question: Question) -> float:
    """1 if an answer contains any of the expected strings, in whatever case (RULER, arXiv 2404.06654)."""
    said = _plain(answer)
    return float(any(expected.lower() in said for expected in question.answers))


def first_number(answer: str, question: Question) -> float:
    """1 if the first whole number that an answer contains is the expected one."""
    found = re.search(r"\d+", answer)
    return float(found is not None and found[0] == question.answers[0])


def _plain(answer: str) -> str:
    """Control characters become line feeds, as in RULER."""
    return re.sub(r"[\x00-\x1f]", "\n", answer).strip().lower()
