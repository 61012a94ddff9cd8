"""Scorers of L-Eval's closed-ended tasks after their definitions (An et al. 2023, arXiv 2307.11088, appendix)."""

from __future__ import annotations

import re

from hf_kvcache.eval.benchmarks.scorers import best
from hf_kvcache.eval.benchmarks.words import normal

LETTERS = "ABCD"


@best
def first_letter(answer: str, expected: str) -> float:
    """1 for the letter of the right option: the first A, B, C or D of an answer."""
    if not answer.strip():
        return exact("None", _expected(expected))
    found = answer if answer in LETTERS else next((c for c in answer if c in LETTERS), "A")
    return exact(found, _expected(expected))


@best
def every_letter(answer: str, expected: str) -> float:
    """1 for all right letters, 0.25 for some of them and no wrong one."""
    if not answer.strip():
        return exact("None", _expected(expected))
    return exact(answer if answer in LETTERS else _letters(answer), _expected(expected))


@best
def final_number(answer: str, expected: str) -> float:
    """1 for the right digits: behind "The answer is", else of the last word with a digit in the first paragraph."""
    return exact(_digits(answer), _digits(expected))


@best
def code_output(answer: str, expected: str) -> float:
    """1 if the expected output stands in the last words of an answer, or behind "the final output"."""
    said = _plain_code(answer)
    for words in ("will be", "of the code", "is", "would be", "the value of", "the result of", "printed"):
        said = said.replace(words, "")
    n = len(expected.split()) + 3
    _, is_final, last = said.rpartition("the final output")
    found = re.split(r"\s+", last)
    return exact(" ".join(found[:n] if is_final else found[-n:]), _plain_code(expected))


@best
def truth(answer: str, expected: str) -> float:
    """1 for the right one of "true" and "false", the first word of an answer that has either in it.

    What the world outside the text says ("[fact: ...]") is neither asked for nor scored here.
    """
    right, said = (text.lower().split("[fact:")[0].strip() for text in (expected, answer))
    for word in said.split():
        for value in ("true", "false"):
            if value in word:
                return exact(value, right)
    return exact("<error>", right)


@best
def contained(answer: str, expected: str) -> float:
    """1 if an answer contains the expected one, whatever case and blanks; numbers are compared as such."""
    return exact(answer, expected)


def exact(said: str, expected: str) -> float:
    """L-Eval's exact match, of letters, of numbers or of one text in another."""
    letters = normal(expected, lower=False)
    if all(c in LETTERS for c in letters):
        said = normal(said, lower=False)
        return 1.0 if said == letters else 0.25 * (set(said) <= set(letters))
    try:
        return float(float(said) == float(expected))
    except ValueError:
        expected, said = (text.lower().replace(" ", "") for text in (expected, said))
        return float(expected in said)


def _letters(answer: str) -> str:
    """All letters that an answer names, in their order; A where there is none."""
    found = re.match(f"[{LETTERS}]*", answer)[0]
    if len(found) > 1:
        return "".join(sorted(set(found)))
    rest = answer[len(found) :].split("Question")[0]
    found += "".join(re.findall(r"[A-Z](?=[\s.)])", rest))
    found = "".join(sorted({c for c in found if c in LETTERS}))
    if not found:
        run = re.search(f"[{LETTERS}]+", rest)
        found = run[0] if run else ""
    return found or "A"


def _expected(text: str) -> str:
    """Letters of the right answer: of its first word."""
    return "".join(c for c in text.split()[0] if c in LETTERS) or "A"


def _digits(text: str) -> str:
    """Digits of the final number, up to its stop."""
    found = re.search(r"The answer is (\S+)", text)
    if found:
        word = found[1]
    else:
        words = reversed(text.split("\n\n")[0].split(" "))
        word = next((word for word in words if any(c.isdigit() for c in word)), "")
    return "".join(c for c in word.split(".")[0] if c.isdigit())


def _plain_code(text: str) -> str:
    """A printed value without the marks that may differ."""
    text = re.sub(r"\s+", " ", text)
    for mark in (",", "'", "\\", ".0"):
        text = text.replace(mark, "")
    return text.replace("] [", "][").replace("[ [", "[[").replace("] ]", "]]")
