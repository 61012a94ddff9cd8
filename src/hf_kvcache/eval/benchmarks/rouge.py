"""ROUGE-L in the three forms that benchmarks of long texts score with (Lin 2004, ROUGE, section 3).

They differ in what a word is, in whether a word counts once or as often as it stands there, and in how sentences are
told apart. All return the F-measure, 0 to 1, and 0 where either text is empty.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain


def rouge_l(answer: str, reference: str) -> float:
    """Longest common subsequence of two whole texts, of lower-case words of a to z and 0 to 9 (L-Eval's)."""
    said, expected = _words(answer), _words(reference)
    return f_measure(_table(expected, said)[-1][-1], len(said), len(expected))


def rouge_l_sum(answer: str, reference: str) -> float:
    """Of every line of the reference the words that a line of the answer has in the same order (InfiniteBench's).

    Words as in `rouge_l`; none counts more often than it stands in both texts.
    """
    said, expected = ([_words(line) for line in text.split("\n") if line] for text in (answer, reference))
    left = [Counter(chain.from_iterable(lines)) for lines in (said, expected)]
    n_said, n_expected = (count.total() for count in left)
    n_common = 0
    for line in expected:
        found = set().union(*(_common(line, other, first=False) for other in said))
        for i in sorted(found):
            if all(count[line[i]] > 0 for count in left):
                n_common += 1
                for count in left:
                    count[line[i]] -= 1
    return f_measure(n_common, n_said, n_expected)


def rouge_l_distinct(answer: str, reference: str) -> float:
    """As `rouge_l_sum`, of words between blanks in sentences that end in a stop; a word counts once (LongBench's)."""
    said, expected = (
        [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]
        for text in (answer, reference)
    )
    words = [set(chain.from_iterable(sentences)) for sentences in (said, expected)]
    found = {line[i] for line in expected for other in said for i in _common(line, other, first=True)}
    return f_measure(len(found), *map(len, words))


def f_measure(n_common: int, n_said: int, n_expected: int) -> float:
    """Harmonic mean of precision and recall."""
    return 2 * n_common / (n_said + n_expected) if n_common else 0.0


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _table(a: list[str], b: list[str]) -> list[list[int]]:
    """Lengths of longest common subsequences of all beginnings, `[len(a) + 1][len(b) + 1]`."""
    rows = [[0] * (len(b) + 1)]
    for word in a:
        above, row = rows[-1], [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        rows.append(row)
    return rows


def _common(a: list[str], b: list[str], first: bool) -> set[int]:
    """Places in `a` of one longest common subsequence with `b`.

    Args:
        first: which one, where there are several: on a tie the search goes on with a shorter `b`, else with a shorter
            `a`. The packages that the benchmarks call (`rouge`, `rouge_score`) differ in that.
    """
    table, i, j, found = _table(a, b), len(a), len(b), set()
    while i and j:
        above, left = table[i - 1][j], table[i][j - 1]
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            found.add(i)
        elif above > left or (above == left and not first):
            i -= 1
        else:
            j -= 1
    return found
