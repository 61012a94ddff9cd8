"""R-KV: importance against redundancy, written out with an N x N matrix."""

import pytest
import torch
from test_snapkv import pooled, votes
from toys import assert_scores, feed

import hf_kvcache as kv
from hf_kvcache.attention.call import AttentionCall
from hf_kvcache.policies import RKV, rkv


def redundancy(k, threshold):
    """Softmax of the column means of the cosines; a row's newest like one is not counted."""
    unit = k / k.norm(dim=-1, keepdim=True)
    cosine = (unit @ unit.T).fill_diagonal_(0)
    for i, row in enumerate(cosine):
        alike = [j for j in range(len(k)) if j != i and threshold is not None and row[j] > threshold]
        if alike:
            row[alike[-1]] = 0
    return cosine.mean(0).softmax(0)


@pytest.mark.parametrize("threshold", [None, 0.5, 0.0, -1.0])
@pytest.mark.parametrize("mix", [0.1, 0.9])
def test_score_is_the_formula(mix, threshold, monkeypatch):
    # several blocks, the last one shorter
    monkeypatch.setattr(rkv, "KEYS", 16)
    toy = feed(RKV(budget=100, mix=mix, threshold=threshold), softcap=2.0)

    def formula(toy, b, h):
        importance = pooled(votes(toy, b, h, 8) / 8, 7, "max")
        return mix * importance - (1 - mix) * redundancy(toy.of(b, h)[1], threshold)

    assert_scores(toy, formula, 1e-6)


def test_the_last_repetition_stays():
    # one vector eight times among many others
    k = torch.eye(64).repeat_interleave(torch.tensor([8] + [1] * 63), 0)

    def scores(policy):
        layer, rows = kv.KVLayer(0, policy=policy), k[None, None]
        view = layer.append(rows, rows.clone())
        layer.compress(AttentionCall(view, torch.zeros(1, 1, 71, 64), scaling=1.0))
        return policy.score(view)[0, 0]

    found = scores(RKV(budget=100, mix=0.0, n_sink=0))
    assert found[:7].max() < found[7] and found[7] <= found[8:].max()
    plain = scores(RKV(budget=100, mix=0.0, threshold=None))
    assert torch.allclose(plain[:8], plain[0])


def test_defaults_are_the_papers():
    policy = RKV(budget=100)
    assert (policy.mix, policy.n_queries) == (0.1, 8)
    with pytest.raises(ValueError, match="mix=2"):
        RKV(budget=100, mix=2)
