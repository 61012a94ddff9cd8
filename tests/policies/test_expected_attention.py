"""Expected attention: moments of the queries before RoPE, rotated by the mean of the next positions."""

from types import SimpleNamespace

import cases
import pytest
import torch
from toys import CALLS, ROPES, SIZE, alone, assert_scores, feed
from transformers import Phi3Config

import hf_kvcache as kv
from hf_kvcache.attention.call import AttentionCall
from hf_kvcache.policies import ExpectedAttention, query_statistics
from hf_kvcache.rope import Rope
from hf_kvcache.shards import WHOLE

INV_FREQ = torch.tensor([1.0, 0.1, 0.01])  # of 8 channels 6 turn
KNOBS = dict(budget=100, n_sink=2, n_recent=4)


def bound(rope, **knobs):
    return ExpectedAttention(**KNOBS | knobs).for_model(SimpleNamespace(rope=lambda: rope, shard=WHOLE))


def rotation(position, scaling):
    """The matrix that RoPE multiplies a row of 8 channels at `position` with."""
    matrix = torch.eye(SIZE, dtype=torch.float64)
    for i, frequency in enumerate(INV_FREQ.double()):
        angle = position * frequency
        c, s = angle.cos() * scaling, angle.sin() * scaling
        matrix[i, i], matrix[i, i + 3], matrix[i + 3, i], matrix[i + 3, i + 3] = c, -s, s, c
    return matrix


def formula(rope, n_future=512, epsilon=1e-2, n_sink=2):
    scaling = 1.0 if rope is None else rope.scaling

    def score(toy, b, h):
        q, k, v = (t.double() for t in toy.of(b, h))
        n = len(k)
        turned = torch.eye(SIZE, dtype=torch.float64)
        if rope is not None:
            q = torch.stack(
                [torch.stack([rotation(i, scaling).inverse() @ x for i, x in enumerate(head)]) for head in q]
            )
            turned = torch.stack([rotation(n + i, scaling) for i in range(n_future)]).mean(0)
        weights = []
        for head in q[:, n_sink:]:
            mean, cov = head.mean(0), torch.cov(head.T, correction=0)
            mean, cov = turned @ mean, turned @ cov @ turned.T
            logits = torch.stack([x @ mean * toy.scaling + x @ cov @ x * toy.scaling**2 / 2 for x in k])
            logits[:n_sink] = float("-inf")
            weights.append(logits.softmax(0))
        return ((torch.stack(weights).mean(0) + epsilon) * v.norm(dim=-1)).float()

    return score


@CALLS
@ROPES
def test_score_is_the_formula(scaling, sizes, monkeypatch):
    # moments of several blocks are merged
    monkeypatch.setattr(query_statistics, "QUERIES", 16)
    rope = None if scaling is None else Rope(INV_FREQ, scaling)
    toy = feed(bound(rope), sizes=sizes, fill=5.0)
    assert_scores(toy, formula(rope))


def test_knobs_matter():
    rope = Rope(INV_FREQ)
    assert_scores(feed(bound(rope, n_future=3, epsilon=0.5, n_sink=5)), formula(rope, 3, 0.5, 5))


def test_moments_survive_what_is_evicted():
    # with no sinks the first tokens go, and with them what says where the row starts
    rope = Rope(INV_FREQ)
    small, large = (feed(bound(rope, budget=n, n_sink=0), sizes=[30] + [1] * 20) for n in (10, 100))
    for name, moment in large.view.layer_state.items():
        assert torch.equal(moment, small.view.layer_state[name]), name
    assert small.layer.store.n_kept < 50
    assert small.view.layer_state["n_pads"].squeeze().tolist() == [[0, 0], [13, 13]]
    assert (small.view.positions >= 0).all()


def test_a_chunk_may_be_all_padding():
    rope = Rope(INV_FREQ)
    toy = feed(bound(rope), pads=(0, 23), sizes=[10, 10, 10, 20], fill=float("nan"))
    assert_scores(toy, formula(rope))
    assert torch.allclose(alone(toy, 1, bound(rope)).scores()[0][1], toy.scores()[1][1], atol=1e-5)


def test_shorter_than_the_sinks():
    toy = feed(bound(Rope(INV_FREQ), n_sink=6), n=4, pads=(0, 2))
    assert toy.policy.score(toy.view).isfinite().all()


def test_all_drafts_rejected():
    layer = kv.KVLayer(0, policy=bound(Rope(INV_FREQ)))
    layer.activate_past_recording()
    k = torch.randn(1, 2, 5, 8)
    layer.compress(AttentionCall(layer.append(k, k), torch.randn(1, 4, 5, 8)))
    layer.crop(-5)
    assert layer.tokens_seen == 0


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2"])
def test_queries_of_a_model_are_unrotated(arch):
    """The mean that is remembered is that of the model's own queries without RoPE, padded or not."""
    model = cases.new_model(cases.ARCHITECTURES[arch]())
    module = model.model.layers[1].self_attn
    seen = []
    # what feeds RoPE: the projection, or the norm behind it
    source = getattr(module, "q_norm", module.q_proj)
    hook = source.register_forward_hook(lambda *a: seen.append(a[-1]))
    ids, mask, _ = cases.padded([40, 33])
    cache = kv.KVCache(policy=ExpectedAttention(**KNOBS))
    cases.replay(model, cache, ids, [20, 20], mask)
    hook.remove()
    q = torch.cat([x.reshape(2, 20, 2, 2, 16) for x in seen], 1)  # [B, S, Hkv, G, D]
    found = cache.layers[1].store.layer_state.views()["mean"].squeeze(2)
    for b, n_pads in enumerate([0, 7]):
        assert torch.allclose(found[b], q[b, n_pads + 2 :].mean(0), atol=1e-4)
    assert cache.policy.rope is None and cache.layers[1].policy.rope is not None


def test_unknown_rope_says_so():
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
    config = Phi3Config(**cases.WITHOUT_HEAD_DIM, rope_parameters=factors, original_max_position_embeddings=32)
    with pytest.raises(ValueError, match="longrope"):
        cases.replay(cases.new_model(config), kv.KVCache(policy=ExpectedAttention(**KNOBS)), cases.prompt(), [60])


def test_knobs_are_checked():
    with pytest.raises(ValueError, match="n_future"):
        ExpectedAttention(budget=100, n_future=0)
