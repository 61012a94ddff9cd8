"""Texts that are longer than a prompt may be: their middle is left out, as in LongBench (arXiv 2308.14508, 4.1)."""

from __future__ import annotations

from collections.abc import Callable

# no tokenizer makes tokens of more characters than that of texts that are read here
_MOST_CHARACTERS = 16


def without_middle(text: str, n_tokens: int, count: Callable[[str], int]) -> str:
    """A text of at most `n_tokens` tokens: its beginning and its end, of half of them each.

    Args:
        count: how many tokens a text has.
    """
    if len(text) <= n_tokens or (len(text) <= _MOST_CHARACTERS * n_tokens and count(text) <= n_tokens):
        return text
    n_head = n_tokens // 2
    head = _longest(lambda n: text[:n], n_head, len(text), count)
    return head + _longest(lambda n: text[len(text) - n :], n_tokens - n_head, len(text) - len(head), count)


def _longest(part: Callable[[int], str], n_tokens: int, most: int, count: Callable[[str], int]) -> str:
    """The longest `part(n)` of `n_tokens` tokens or less, `n <= most` characters."""
    low, high = 0, min(most, _MOST_CHARACTERS * n_tokens) + 1
    n = min(4 * n_tokens, high - 1)
    while high - low > 1:
        found = count(part(n))
        if found == n_tokens:
            return part(n)
        if found < n_tokens:
            low = n
            # the rest is as long as what there is
            n += max((n_tokens - found) * n // max(found, 1), 1)
        else:
            high = n
            n -= max((found - n_tokens) * n // found, 1)
        if not low < n < high:
            n = (low + high) // 2
    return part(low)
