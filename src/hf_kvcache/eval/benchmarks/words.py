"""Words of answers as benchmarks compare them: without what does not matter, and how many are common."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from hf_kvcache.eval.benchmarks.rouge import f_measure

# marks of Chinese and of typesetters that scorers take out, beside those of ASCII
_MARKS = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿"
    "–—‘’‛“”„‟…‧﹏."
)
_PLAIN = str.maketrans("", "", string.punctuation)
_PLAIN_ZH = str.maketrans("", "", string.punctuation + _MARKS)


def normal(text: str, lower: bool = True) -> str:
    """English without punctuation, articles and more than one blank in a row (SQuAD, arXiv 1606.05250)."""
    text = (text.lower() if lower else text).translate(_PLAIN)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def characters(text: str) -> list[str]:
    """Characters of a Chinese text, in lower case and without punctuation and blanks."""
    return list("".join(text.lower().translate(_PLAIN_ZH).split()))


def f1(said: Sequence[str], expected: Sequence[str]) -> float:
    """F1 of two bags of words, 0 to 1."""
    n_common = (Counter(said) & Counter(expected)).total()
    return f_measure(n_common, len(said), len(expected))


def qa_f1(answer: str, reference: str) -> float:
    """F1 of the words of `normal` texts."""
    return f1(normal(answer).split(), normal(reference).split())


def qa_f1_zh(answer: str, reference: str) -> float:
    """F1 of characters of Chinese texts."""
    return f1(characters(answer), characters(reference))
