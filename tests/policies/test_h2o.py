"""H2O: attention adds up over all queries, and half the budget are recent tokens."""

import pytest
import torch
from toys import alone, assert_scores, feed, pairs

import hf_kvcache as kv
from hf_kvcache.attention.call import AttentionCall
from hf_kvcache.policies import H2O


def formula(toy, b, h):
    """Everything that a token has ever got from any query, meaned over the group."""
    return toy.weights(b, h).mean(0).sum(0)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sizes", [[50], [7] * 7 + [1], [30] + [1] * 20], ids=["one-shot", "chunked", "decode"])
def test_mass_is_the_accumulated_attention(sizes, softcap):
    assert_scores(feed(H2O(budget=100), sizes=sizes, softcap=softcap), formula)


def test_evicted_rows_get_nothing_and_kept_ones_share_what_there_is():
    policy = H2O(budget=20, n_sink=2, n_recent=4)
    toy = feed(policy, sizes=[40], pads=(0, 0), n=40)
    kept = toy.layer.store.positions.long()
    before = toy.view.state("mass").clone()
    torch.manual_seed(0)
    k, q = torch.randn(2, 2, 1, 8), torch.randn(2, 6, 1, 8)
    toy.layer.compress(AttentionCall(toy.layer.append(k, k), q, scaling=toy.scaling))
    after = toy.view.state("mass")
    assert after.shape[-1] == 21
    # a query gives away one: all of it goes to rows that are there
    assert torch.allclose(after.sum(-1) - before.sum(-1), torch.ones(2, 2), atol=1e-5)
    for b, h in pairs(toy):
        rows = torch.cat([toy.k[b, h, kept[b, h]], k[b, h]])
        weights = (q[b].unflatten(0, (2, 3))[h] @ rows.T * toy.scaling).softmax(-1)[:, 0].mean(0)
        expected = formula(toy, b, h)[kept[b, h]]
        assert torch.allclose(after[b, h, :20], expected + weights[:20], atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_budget_is_shared_by_hitters_and_recents(share):
    toy = feed(H2O(budget=22, n_sink=2, n_recent=2, recent_share=share), pads=(0, 0))
    n_recent = max(int(20 * share), 2)
    for b, h in pairs(toy):
        mass = formula(toy, b, h)
        mass[:2] = mass[50 - n_recent :] = float("inf")
        assert toy.layer.store.positions[b, h].tolist() == mass.topk(22).indices.sort().values.tolist()


def test_padding_has_no_say_in_chunks():
    # the whole first chunk of the second row is padding
    sizes = [10, 10, 10, 20]
    toy = feed(H2O(budget=100), pads=(0, 13), sizes=sizes, fill=3.0)
    assert_scores(toy, formula)
    assert torch.allclose(alone(toy, 1, H2O(budget=100)).scores()[0][0], toy.scores()[1][0], atol=1e-5)


def test_all_drafts_rejected():
    layer = kv.KVLayer(0, policy=H2O(budget=100))
    layer.activate_past_recording()
    k = torch.randn(1, 2, 5, 8)
    layer.compress(AttentionCall(layer.append(k, k), torch.randn(1, 4, 5, 8)))
    layer.crop(-5)
    assert layer.tokens_seen == 0


def test_share_is_checked():
    with pytest.raises(ValueError, match="recent_share=1.5"):
        H2O(budget=64, recent_share=1.5)
