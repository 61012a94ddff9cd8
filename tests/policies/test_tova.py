"""TOVA: the newest query's attention, averaged over all heads, which keep the same tokens."""

import pytest
import torch
from toys import HEADS, assert_scores, feed

from hf_kvcache.policies import TOVA


def formula(toy, b, h):
    """Weights of the last query, meaned over every query head of the layer."""
    return torch.cat([toy.weights(b, head)[:, -1] for head in range(HEADS)]).mean(0)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_score_is_the_formula(softcap):
    assert_scores(feed(TOVA(budget=100), softcap=softcap), formula, 1e-6)


def test_heads_keep_the_same_tokens_and_rows_their_own():
    toy = feed(TOVA(budget=20, n_sink=2, n_recent=4, interval=1), sizes=[40] + [1] * 10, pads=(0, 0))
    positions = toy.layer.store.positions
    assert positions.shape == (2, HEADS, 20)
    assert torch.equal(positions[:, 0], positions[:, 1])
    assert not torch.equal(positions[0], positions[1])
    assert positions[0, 0].tolist() != list(range(2)) + list(range(32, 50))
