"""L2Norm: the score is minus the norm of the key."""

from toys import assert_scores, feed

from hf_kvcache.policies import L2Norm


def test_score_is_the_formula():
    toy = feed(L2Norm(budget=100))
    assert_scores(toy, lambda toy, b, h: -toy.of(b, h)[1].square().sum(-1).sqrt())
