"""ChunkKV: whole chunks of neighbouring tokens, by the mean of any scorer's scores."""

from types import SimpleNamespace

import cases
import pytest
import torch
from toys import HEADS, alone, feed, pairs

import hf_kvcache as kv
from hf_kvcache.policies.base import policy_from_spec
from hf_kvcache.shards import WHOLE

KNOBS = dict(n_sink=2, n_recent=4, interval=4)
SIZE = 5


def chunked(budget=24, scorer="keydiff", chunk_size=SIZE, **knobs):
    return kv.ChunkKV(budget=budget, scorer=scorer, chunk_size=chunk_size, **KNOBS | knobs)


def chunks_of(n, chunk_size=SIZE, n_sink=2, n_recent=4):
    """The tokens of a text of `n` that may go, chunk by chunk."""
    free = range(n_sink, n - n_recent)
    return [[i for i in free if (i - n_sink) // chunk_size == c] for c in range(len(free) // chunk_size + 1)]


def plain(scores, budget=24, n_sink=2, n_recent=4):
    """The tokens that stay of one head, chunk after chunk until the budget is full."""
    n = len(scores)
    kept = [*range(n_sink), *range(n - n_recent, n)]
    own = [chunk for chunk in chunks_of(n, n_sink=n_sink, n_recent=n_recent) if chunk]
    for chunk in sorted(own, key=lambda c: -sum(scores[i] for i in c) / len(c)):
        kept += chunk[: budget - len(kept)]
    return sorted(kept)


SCORERS = {
    "keydiff": kv.KeyDiff,
    "l2norm": kv.L2Norm,
    # of the 22 rows beside the sinks half are the newest
    "h2o": lambda budget, **knobs: kv.H2O(budget=budget, recent_share=11 / (budget - 2), **knobs),
    "snapkv": lambda **knobs: kv.SnapKV(n_queries=4, **knobs),
    "triattention": kv.TriAttention,
}


@pytest.mark.parametrize("scorer, fill", [(name, 3.0) for name in SCORERS] + [("h2o", float("nan"))], ids=str)
def test_the_best_chunks_stay(scorer, fill):
    """Of every head of every row, padded or not, as it is said token by token."""
    context = SimpleNamespace(rope=lambda: None, shard=WHOLE)
    small, large = (SCORERS[scorer](budget=n, **KNOBS).for_model(context) for n in (24, 200))
    toy, whole = feed(chunked(scorer=small), fill=fill), feed(large, fill=fill)
    for b, h in pairs(toy):
        scores = whole.scores()[b][h].tolist()
        kept = (toy.layer.store.positions[b, h] - toy.pads[b]).tolist()
        assert kept == plain(scores, n_recent=11 if scorer == "h2o" else 4)


def test_score_is_the_mean_of_what_may_go():
    toy = feed(chunked(200), pads=(0, 13))
    scorer = feed(kv.KeyDiff(budget=200, **KNOBS), pads=(0, 13))
    said, tokens = toy.scores(), scorer.scores()
    for b, h in pairs(toy):
        for chunk in chunks_of(50 - toy.pads[b]):
            for i in chunk:
                assert said[b][h][i] == pytest.approx(tokens[b][h][chunk].mean().item(), abs=1e-6)


def test_one_token_per_chunk_is_the_scorer():
    one, scorer = feed(chunked(chunk_size=1)), feed(kv.KeyDiff(budget=24, **KNOBS))
    assert torch.equal(one.layer.store.positions, scorer.layer.store.positions)


def test_of_equal_chunks_the_oldest_stay_whole():
    policy = chunked(16)
    positions = torch.arange(40).expand(1, HEADS, 40)
    # packed rows stand before the sinks in view order
    order = torch.cat([torch.arange(20, 30), torch.arange(20), torch.arange(30, 40)])
    kept = policy.select(torch.zeros(1, HEADS, 40), positions[..., order], 40, 0)
    assert positions[..., order].gather(-1, kept)[0, 0].sort().values.tolist() == [*range(12), *range(36, 40)]


def test_what_is_left_of_a_cut_chunk_is_a_shorter_chunk():
    """While decoding: positions say which chunk a row is of, and what it still has is what it is worth."""
    policy = chunked(18, n_recent=2)
    # of the chunk at 7 to 11 two rows are left, beside 2 to 6 and 12 to 16; the recent ones are 22 and 23
    held = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23])
    worth = torch.zeros(24)
    worth[2:7], worth[7:9], worth[12:17], worth[17:22] = 1.0, 2.0, 3.0, torch.tensor([9.0, 0, 0, 0, 0])
    policy.scorer.score = lambda view: worth[held].expand(1, HEADS, -1)
    view = SimpleNamespace(positions=held.expand(1, HEADS, -1), tokens_seen=24)
    scores = policy.score(view)
    assert scores[0, 0, 2:19].tolist() == pytest.approx([1.0] * 5 + [2.0] * 2 + [3.0] * 5 + [1.8] * 5)
    kept = held[policy.select(scores, view.positions, 24, 0)[0, 0]].tolist()
    # 14 rows beside sinks and recent ones: 12 to 16, 7 and 8, 17 to 21, and two of the last chunk
    assert kept == [0, 1, 2, 3, 7, 8, *range(12, 24)]


@pytest.mark.parametrize("size", [dict(budget=24), dict(budget=None, ratio=0.4)], ids=["budget", "ratio"])
@pytest.mark.parametrize("scorer", ["keydiff", "h2o", "triattention"])
def test_budget_is_never_exceeded(scorer, size):
    model, (ids, mask, _) = cases.tiny_model(), cases.padded([60, 41])
    cache = kv.KVCache(policy=chunked(scorer=scorer, **size))
    cases.replay(model, cache, ids, [60], mask)
    for n in range(60, 72):
        most = 24 if size["budget"] else int(0.4 * n)
        for layer in cache.layers:
            # a decoding layer evicts once per `interval` tokens
            assert layer.store.n_kept < most + (0 if n == 60 else 4) + 1
        cases.replay(model, cache, cases.prompt(2, 1, seed=n), [1], None)
    assert cache.get_seq_length() == 72


def test_a_padded_row_is_the_row_alone_while_decoding():
    # both prompts are longer than the budget, so that rows go at the same time
    toy = feed(chunked(scorer="l2norm"), sizes=[38] + [1] * 12, pads=(0, 13))
    single = alone(toy, 1, chunked(scorer="l2norm"), [25] + [1] * 12)
    assert torch.equal(toy.layer.store.positions[1] - 13, single.layer.store.positions[0])


def test_layers_have_the_budgets_of_the_scorer():
    scorer = kv.PyramidKV(budget=24, beta=2, n_queries=4, **KNOBS)
    cache = kv.KVCache(policy=kv.ChunkKV(budget=24, scorer=scorer, chunk_size=SIZE, **KNOBS))
    cases.replay(cases.tiny_model(), cache, cases.prompt(2, 60), [60])
    first, last = (layer.store.n_kept for layer in cache.layers)
    assert first > last and first + last == 48


def test_goes_under_adakv_and_merge():
    model, ids = cases.tiny_model(), cases.prompt(2, 60)
    inner = chunked(44)
    for policy in (kv.AdaKV(budget=44, scorer=inner, **KNOBS), kv.Merge.over(inner)):
        out = cases.generate(model, ids, kv.KVCache(policy=policy, window=4 if policy.is_ragged else 0))
        assert torch.stack(out.logits).isfinite().all()


def test_spec_and_knobs():
    policy = chunked(100, scorer=kv.SnapKV(budget=100, kernel=1))
    assert policy_from_spec(policy.spec()) == policy
    with pytest.raises(ValueError, match="chunk_size=0"):
        chunked(chunk_size=0)
    with pytest.raises(ValueError, match="chooses by itself"):
        chunked(scorer=kv.AdaKV(budget=100))
