"""A layer without a model, fed with random rows, and attention as it is written on paper."""

from dataclasses import dataclass

import pytest
import torch

import hf_kvcache as kv
from hf_kvcache.attention.call import AttentionCall
from hf_kvcache.view import KVView

HEADS, GROUP, SIZE = 2, 3, 8


@dataclass
class Toy:
    """Random queries, keys and values of `len(pads)` left-padded rows, and the layer that has seen them.

    The rows of `of(b, h)` are those of one head of one row without its padding.
    """

    layer: kv.KVLayer
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pads: list[int]
    scaling: float
    softcap: float | None

    @property
    def policy(self):
        return self.layer.policy

    @property
    def view(self):
        return KVView(self.layer, self.k, self.v, is_prefill=False)

    def scores(self):
        """`[B][Hkv][n]`: what the policy says of the real tokens."""
        scores = self.policy.score(self.view)
        return [[scores[b, h, n:] for h in range(HEADS)] for b, n in enumerate(self.pads)]

    def of(self, b, h):
        """Queries `[G, n, D]`, keys and values `[n, D]` of one head of one row."""
        n = self.pads[b]
        return self.q[b].unflatten(0, (HEADS, GROUP))[h, :, n:], self.k[b, h, n:], self.v[b, h, n:]

    def weights(self, b, h):
        """Attention weights `[G, n, n]` of one head of one row, from the dense tensors."""
        q, k, _ = self.of(b, h)
        scores = q @ k.T * self.scaling
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, float("-inf")).softmax(-1)


# how 50 tokens may come, and the factor on cosines and sines of a model with RoPE
CALLS = pytest.mark.parametrize("sizes", [[50], [7] * 7 + [1], [30] + [1] * 20], ids=["one-shot", "chunked", "decode"])
ROPES = pytest.mark.parametrize("scaling", [None, 1.0, 1.2], ids=["no-rope", "rope", "yarn"])


def feed(policy, n=50, pads=(0, 13), sizes=None, seed=0, scaling=0.4, softcap=None, fill=0.0, codec=None, window=4):
    """A layer that has seen `n` tokens in pieces of `sizes`; pads hold `fill`."""
    layer = kv.KVLayer(3, codec, codec, policy, window=window)
    generator = torch.Generator().manual_seed(seed)
    # a row is the same however much it is padded
    q, k, v = (torch.randn(len(pads), n, heads, SIZE, generator=generator) for heads in (HEADS * GROUP, HEADS, HEADS))
    k, v = k + 0.5, v * torch.rand(v.shape[:3], generator=generator).unsqueeze(-1) * 2
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    mask = torch.ones(len(pads), 1, n, n, dtype=torch.bool)
    for b, pad in enumerate(pads):
        for t in (q, k, v):
            t[b, :, :pad] = fill
        mask[b, ..., :pad] = False
    toy = Toy(layer, q, k, v, list(pads), scaling, softcap)
    start = 0
    for size in sizes or [n]:
        rows = slice(start, start + size)
        view = layer.append(k[:, :, rows], v[:, :, rows])
        seen = mask[:, :, : rows.stop, : rows.stop]
        call = AttentionCall(view, q[:, :, rows], seen, scaling=scaling, softcap=softcap)
        layer.prepare(call)
        layer.compress(call)
        start = rows.stop
    assert start == n
    return toy


def alone(toy, b, policy, sizes=None):
    """Row `b` of a toy by itself, without its padding."""
    n = toy.pads[b]
    q, k, v = (t[b : b + 1, :, n:] for t in (toy.q, toy.k, toy.v))
    layer = kv.KVLayer(3, policy=policy)
    start = 0
    for size in sizes or [k.shape[2]]:
        rows = slice(start, start + size)
        view = layer.append(k[:, :, rows], v[:, :, rows])
        layer.compress(AttentionCall(view, q[:, :, rows], scaling=toy.scaling, softcap=toy.softcap))
        start = rows.stop
    return Toy(layer, q, k, v, [0], toy.scaling, toy.softcap)


def pairs(toy):
    """Every (row, head)."""
    return [(b, h) for b in range(len(toy.pads)) for h in range(HEADS)]


def assert_scores(toy, formula, atol=1e-5):
    """The policy's scores are what `formula(toy, b, h)` says, for every head of every row."""
    scores = toy.scores()
    for b, h in pairs(toy):
        expected = formula(toy, b, h)
        assert expected.shape == scores[b][h].shape
        worst = (scores[b][h] - expected).abs().max().item()
        assert worst <= atol, f"row {b}, head {h}: off by {worst:.2e}"
