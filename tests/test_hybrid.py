"""Models that mix sliding-window with full attention keep transformers' own sliding layers."""

import pytest
import torch
from cases import (
    BY_ID,
    HYBRIDS,
    NAMED,
    assert_close,
    generate,
    padded,
    prompt,
    replay,
    stock_implementation,
    tiny_model,
)
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import hf_kvcache as kv


def kinds(cache):
    return [type(layer) for layer in cache.layers]


EXPECTED = {
    "mistral-window8": [DynamicSlidingWindowLayer] * 2,
    "gemma2": [DynamicSlidingWindowLayer, kv.KVLayer] * 2,
    "gemma3": [DynamicSlidingWindowLayer, kv.KVLayer] * 2,
}


@pytest.mark.parametrize("with_config", [False, True], ids=["lazy", "config"])
@pytest.mark.parametrize("arch", HYBRIDS)
def test_only_full_attention_layers_are_ours(arch, with_config):
    model = tiny_model(arch)
    cache = kv.QuantCache(4, window=8, config=model.config if with_config else None)
    generate(model, prompt(2), cache)
    assert kinds(cache) == EXPECTED[arch]
    for layer in cache.layers:
        if isinstance(layer, kv.KVLayer):
            assert layer.store.n_packed == 64
        else:
            assert layer.keys.shape[2] == 7
    assert cache.nbytes < cache.nbytes_dense or arch == "mistral-window8"
    assert len(cache.report()) == len(cache.layers)


@pytest.mark.parametrize("kind", ["named", "stock"])
@pytest.mark.parametrize("arch", HYBRIDS)
def test_lossless_over_turns_beams_and_chunks(arch, kind):
    model = tiny_model(arch, NAMED if kind == "named" else stock_implementation(arch))
    ids, mask, _ = padded([40, 31])
    for options in (dict(num_beams=3), dict(prefill_chunk_size=16)):
        dense = generate(model, ids, DynamicCache(config=model.config), attention_mask=mask, **options)
        ours = generate(model, ids, kv.KVCache(), attention_mask=mask, **options)
        assert torch.equal(ours.sequences, dense.sequences), options
    cache, text = kv.KVCache(), prompt(1, 20)
    for turn in range(3):
        text = torch.cat([generate(model, text, cache, max_new_tokens=6).sequences, prompt(1, 5, seed=turn)], 1)
    n = text.shape[1] - 5
    logits = replay(model, cache, text[:, n - 1 :], [6])
    assert_close("logits", logits, model(text, use_cache=False).logits[:, n - 1 :], 1e-5)


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_beams_reset_and_selection_reach_both_kinds(arch):
    model, cache = tiny_model(arch), BY_ID["keydiff-budget24"].make()
    replay(model, cache, prompt(3), [60])
    cache.batch_select_indices(torch.tensor([2, 0]))
    alone = BY_ID["keydiff-budget24"].make()
    replay(model, alone, prompt(3)[[2, 0]], [60])
    ours, theirs = (replay(model, c, prompt(2, 5), [1] * 5) for c in (cache, alone))
    assert_close("logits", ours, theirs, 1e-5)
    cache.reset()
    # another batch size, in the layers of both kinds
    ours, theirs = (replay(model, c, prompt(), [60]) for c in (cache, BY_ID["keydiff-budget24"].make()))
    assert torch.equal(ours, theirs)
    assert kinds(cache) == EXPECTED[arch]


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_edge_layers_count_all_layers(arch):
    # four layers, of which 1 and 3 are ours: 3 is an edge, 1 is not
    cache = kv.QuantCache(4, window=8, edge_layers=1)
    replay(tiny_model(arch), cache, prompt(), [60])
    assert [cache.layers[i].store.keys.bits for i in (1, 3)] == [4, 8]


def test_edge_layers_on_a_plain_model():
    cache = kv.QuantCache(2, window=8, edge_layers=1, edge_bits=4)
    replay(tiny_model(), cache, prompt(), [60])
    assert [layer.store.values.bits for layer in cache.layers] == [4, 4]


def test_edge_layers_stay_dense_without_an_edge_codec():
    cache = kv.SparseCache(0.5, window=8, edge_layers=1)
    replay(tiny_model("gemma2"), cache, prompt(), [60])
    assert [cache.layers[i].store.keys is None for i in (1, 3)] == [False, True]
