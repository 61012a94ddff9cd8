"""Which tokens are read before a cache compresses, which are fed through it, which are scored."""

import pytest

from hf_kvcache.lm_eval.passages import Passage, answer, text


def test_an_answer_is_fed_from_the_last_token_of_its_context_on():
    assert answer([1, 2, 3], [4, 5], 10) == Passage((1, 2), (3, 4), 5, n_given=3)
    assert answer([1], [2], 10) == Passage((), (1,), 2, n_given=1)
    # no prediction of the prefill is scored
    assert answer([1, 2, 3], [4, 5], 10).n_by_the_way == 0


def test_the_first_half_of_a_text_is_scored_by_the_way():
    found = text([0], [1, 2, 3, 4, 5, 6], 10)
    assert found == Passage((0, 1, 2), (3, 4, 5), 6, n_given=1)
    # those after 0, 1 and 2
    assert found.n_by_the_way == 3


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("n_context", [1, 2, 5])
def test_every_token_of_a_text_is_scored_once(n_context, n):
    ids = list(range(n_context + n))
    found = text(ids[:n_context], ids[n_context:], 100)
    assert [*found.read, *found.fed, found.last] == ids and found.fed
    # and so many follow the tokens that are fed
    assert found.n_by_the_way + len(found.fed) == n and found.n_by_the_way >= 0


def test_a_long_context_of_a_window_is_read_as_a_whole():
    found = text([0, 1, 2, 3, 4, 5], [6, 7], 10)
    assert found.read == (0, 1, 2, 3, 4, 5) and found.n_by_the_way == 1


@pytest.mark.parametrize("cut", [answer, text])
def test_too_long_a_context_loses_its_beginning(cut):
    found = cut([1, 2, 3, 4, 5], [6, 7], 4)
    assert (*found.read, *found.fed, found.last) == (3, 4, 5, 6, 7) and found.n_given == 3


@pytest.mark.parametrize("cut", [answer, text])
def test_what_cannot_be_scored_is_refused(cut):
    with pytest.raises(ValueError, match="5 tokens, and the model reads at most 4"):
        cut([1], [2, 3, 4, 5, 6], 4)
    assert cut([1], [2, 3, 4, 5], 4).last == 5
    for context, continuation in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="nothing to score"):
            cut(context, continuation, 4)
