"""Perplexity and KL through a compressed cache: nothing for a lossless one, much for a broken one."""

import math

import pytest
import torch
from cases import prompt, tiny_model
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

import hf_kvcache as kv
from hf_kvcache.eval.fidelity import build_windows, dense_logits, fidelity

N_CONTEXT, N_NEXT = 96, 32


class ZeroedCache(DynamicCache):
    """Forgets what every value was."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.layers[layer_idx].values = torch.zeros_like(self.layers[layer_idx].values)
        return keys, values


@pytest.fixture(scope="module")
def windows():
    return prompt(batch=2, length=N_CONTEXT + N_NEXT)


@pytest.fixture(scope="module")
def dense(windows):
    return dense_logits(tiny_model(), windows, N_CONTEXT)


def score(windows, dense, make_cache, step=8):
    return fidelity(tiny_model(), windows, N_CONTEXT, dense, make_cache, step)


@pytest.mark.parametrize("step", [1, 5, 64])
@pytest.mark.parametrize("make_cache", [DynamicCache, kv.KVCache])
def test_lossless_cache_scores_as_the_dense_model(windows, dense, make_cache, step):
    scores = score(windows, dense, make_cache, step)
    loss = cross_entropy(dense.flatten(0, 1), windows[:, N_CONTEXT + 1 :].flatten())
    assert scores.kl == pytest.approx(0, abs=1e-6)
    assert scores.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_fewer_bits_score_worse(windows, dense):
    kls = [score(windows, dense, lambda bits=bits: kv.QuantCache(bits, window=0)).kl for bits in (8, 4, 2)]
    assert kls[0] < kls[1] < kls[2]
    assert kls[1] > 1e-6


def test_broken_cache_shows(windows, dense):
    broken = score(windows, dense, ZeroedCache)
    assert broken.kl > 10 * score(windows, dense, lambda: kv.QuantCache(8, window=0)).kl
    assert broken.kl > 0.01


def test_context_is_compressed_before_anything_is_predicted(windows, dense):
    tokens_kept = []

    def make_cache():
        cache = kv.EvictionCache("streaming", budget=40, n_recent=8, interval=4)
        tokens_kept.append(cache)
        return cache

    assert score(windows, dense, make_cache).kl > 1e-4
    assert tokens_kept[0].layers[0].store.n_kept <= 40 + 8
    assert tokens_kept[0].get_seq_length() == N_CONTEXT + N_NEXT - 1


def test_windows_predict_no_token_twice():
    ids = torch.arange(1000)
    windows = build_windows(ids, n_context=200, n_next=100, n_windows=50, bos=7)
    assert windows.shape[1] == 300 and (windows[:, 0] == 7).all()
    predicted = windows[:, 200:].flatten()
    assert predicted.unique().numel() == predicted.numel()
    assert windows[0, 1] == 0 and windows[-1, -1] == 999


def test_one_window_is_the_start_of_the_text():
    assert torch.equal(build_windows(torch.arange(30), 10, 10, 1, bos=None), torch.arange(20)[None])


def test_short_text_is_refused():
    with pytest.raises(ValueError, match="the text has 50 tokens"):
        build_windows(torch.arange(50), 40, 20, 4, bos=None)
