"""Streaming keeps the first and the newest tokens; and what every policy shares: budgets, schedule, padding."""

import pytest
import torch

import hf_kvcache as kv
from hf_kvcache.attention.call import AttentionCall


def feed(layer, sizes, mask=None):
    """Append tokens in pieces of `sizes` and compress; yields the layer after each."""
    for n in sizes:
        k = torch.randn(2, 2, n, 8)
        view = layer.append(k, k)
        call = AttentionCall(view, torch.randn(2, 4, n, 8), mask if n > 1 else None)
        layer.prepare(call)
        layer.compress(call)
        yield layer


def test_score_is_the_position():
    layer = kv.KVLayer(0, policy=kv.Streaming(budget=48))
    k = torch.randn(1, 2, 50, 8)
    view = layer.append(k, k)
    assert torch.equal(layer.policy.score(view), torch.arange(50.0).expand(1, 2, 50))


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("sizes", [[50] + [1] * 30, [1] * 80, [7] * 11, [16] * 5], ids=["prompt", "1", "7", "16"])
def test_keeps_sinks_and_the_newest(sizes, interval):
    policy = kv.Streaming(budget=20, n_sink=3, n_recent=8, interval=interval)
    for layer in feed(kv.KVLayer(0, policy=policy), sizes):
        kept, seen = layer.store.positions[1, 1].tolist(), layer.tokens_seen
        # the budget is met after every piece of a prompt, and overshot by less than `interval` while decoding
        assert len(kept) <= 20 + interval - 1
        assert kept == sorted(kept)
        n_recent = len(kept) - 3
        assert kept == (list(range(3)) + list(range(seen - n_recent, seen)) if seen > len(kept) else list(range(seen)))
        assert layer.get_mask_sizes(5) == (seen + 5, 0), "masks are about tokens"
        assert layer.get_seq_length() == seen
    assert layer.evicted_at is not None


def test_ratio_follows_the_text():
    for layer in feed(kv.KVLayer(0, policy=kv.Streaming(ratio=0.5, n_sink=2, n_recent=4, interval=1)), [40] + [1] * 40):
        assert layer.store.n_kept in (layer.tokens_seen // 2, (layer.tokens_seen + 1) // 2)


def test_decode_false_evicts_only_the_prompt():
    layer = kv.KVLayer(0, policy=kv.Streaming(budget=20, n_sink=2, n_recent=4, decode=False))
    kept = [layer.store.n_kept for layer in feed(layer, [50] + [1] * 30)]
    assert kept == list(range(20, 51))


def test_padding_goes_first_and_does_not_count_as_sinks():
    policy = kv.Streaming(budget=20, n_sink=3, n_recent=8, interval=1)
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool)
    mask[0, ..., :15] = False
    mask[1, ..., :30] = False
    (layer,) = feed(kv.KVLayer(0, policy=policy), [40], mask)
    assert layer.store.positions[0, 0].tolist() == [15, 16, 17] + list(range(23, 40))
    # ten real tokens: the rest of the budget is padding, which is never seen
    assert layer.store.positions[1, 0].tolist() == [-1] * 10 + list(range(30, 40))
    list(feed(layer, [1] * 10))
    assert layer.store.positions[1, 0].tolist() == list(range(30, 50))


def test_eviction_waits_for_crop_while_past_is_recorded():
    layer = kv.KVLayer(0, policy=kv.Streaming(budget=20, n_sink=2, n_recent=4, interval=1))
    layer.activate_past_recording()
    list(feed(layer, [44]))
    assert layer.store.n_kept == 44
    layer.crop(-4)
    assert layer.tokens_seen == 40 and layer.store.positions[0, 0].tolist() == [0, 1] + list(range(22, 40))
    # a crop that never comes is made up for at the next append
    list(feed(layer, [3, 1]))
    layer.finish()
    assert layer.store.n_kept == 20


def test_rejected_drafts_have_no_say():
    # a policy that reads queries gets those of the accepted tokens only
    seen = []

    class Listens(kv.Streaming):
        wants_queries, n_queries = True, 8

        def on_queries(self, q, view):
            seen.append((q.shape[2], view.n_kept, view.tokens_seen, view.queries(8).shape[3]))

    layer = kv.KVLayer(0, policy=Listens(budget=20, n_sink=2, n_recent=4, interval=1))
    layer.activate_past_recording()
    list(feed(layer, [44]))
    layer.crop(-4)
    list(feed(layer, [5]))
    layer.crop(-3)
    assert seen == [(40, 40, 40, 8), (2, 22, 42, 8)]
