"""Operations over all layers happen in all of them, or are refused and change none."""

import copy

import pytest
import torch
from cases import ARCHITECTURES, KNOBS, assert_same_state, new_model, prompt, replay, tiny_model
from transformers import DynamicCache

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument

REFUSED_LATER = {
    # the first layer could, a later one cannot: it has evicted what would have to come back
    "duo": ("llama", lambda: kv.EvictionCache("duo", gates=[[1.0, 1.0], [0.0, 0.0]], window=4, **KNOBS)),
    "pyramidkv": ("llama", lambda: kv.EvictionCache("pyramidkv", budget=48, beta=8, n_queries=4, **KNOBS)),
    "after-a-window": ("gemma2", lambda: kv.EvictionCache("snapkv", budget=24, n_queries=4, **KNOBS)),
}


def seen(cache):
    return [layer.get_seq_length() for layer in cache.layers]


@pytest.mark.parametrize("name", REFUSED_LATER)
def test_a_refused_crop_changes_nothing(name):
    arch, make = REFUSED_LATER[name]
    model, cache, ids = tiny_model(arch), make(), prompt(1, 61)
    replay(model, cache, ids[:, :60], [60])
    # a window of transformers' own may be cropped while it records
    for layer in cache.layers:
        if not isinstance(layer, kv.KVLayer):
            layer.activate_past_recording()
    before, twin = seen(cache), copy.deepcopy(cache)
    with pytest.raises(ValueError, match="cannot crop 20 tokens"):
        cache.crop(-20)
    assert seen(cache) == before
    assert_same_state(cache, twin)
    ours, theirs = (model(ids[:, 60:], **cache_argument(c)).logits for c in (cache, twin))
    assert torch.equal(ours, theirs)


def test_a_crop_that_transformers_layers_refuse_changes_nothing():
    model, cache = tiny_model("gemma2"), kv.QuantCache(8, window=8)
    replay(model, cache, prompt(1, 60), [60])
    before, twin = seen(cache), copy.deepcopy(cache)
    with pytest.raises(RuntimeError, match="does not track past states"):
        cache.crop(-3)
    assert seen(cache) == before
    assert_same_state(cache, twin)


def test_a_crop_takes_no_positive_number():
    cache = kv.KVCache()
    replay(tiny_model(), cache, prompt(1, 20), [20])
    with pytest.raises(ValueError, match="zero or negative"):
        cache.crop(3)
    assert seen(cache) == [20, 20]


INDICES = [(0, 2), [0, 2], torch.tensor([0, 2]), torch.tensor([True, False, True]), torch.tensor([0, -1]), (2, 2, 0, 1)]


@pytest.mark.parametrize("indices", INDICES, ids=str)
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_rows_are_selected_as_by_a_dynamic_cache(arch, indices):
    model, ids = tiny_model(arch), prompt(3, 40)
    caches = kv.KVCache(), DynamicCache(config=model.config)
    for cache in caches:
        model(ids, **cache_argument(cache))
        cache.batch_select_indices(indices)
    follow = prompt(caches[1].layers[1].keys.shape[0], 1)
    ours, theirs = (model(follow, **cache_argument(cache)).logits for cache in caches)
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    "indices, error",
    [
        ((0, 3), IndexError),
        ([-4], IndexError),
        (torch.tensor([True]), IndexError),
        ([0.5], TypeError),
        ([[0]], TypeError),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [kv.KVCache, lambda: kv.EvictionCache("adakv", ratio=0.5, window=4, **KNOBS)])
def test_rows_that_are_not_there(make, indices, error):
    cache = make()
    replay(tiny_model(), cache, prompt(3, 60), [60])
    twin = copy.deepcopy(cache)
    with pytest.raises(error):
        cache.batch_select_indices(indices)
    assert_same_state(cache, twin)


def test_repeats():
    cache = kv.QuantCache(8, window=8)
    replay(tiny_model(), cache, prompt(2, 40), [40])
    with pytest.raises(ValueError, match="repeats=0"):
        cache.batch_repeat_interleave(0)
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 6


@pytest.mark.parametrize("make", [kv.KVCache, lambda: kv.QuantCache(8, window=8)], ids=["dense", "quant8"])
def test_layers_give_rows_to_code_that_expects_them(make):
    cache, stock = make(), DynamicCache()
    assert cache.layers == []
    for held in (cache, stock):
        replay(tiny_model(), held, prompt(2, 60), [60])
    for ours, theirs in zip(cache.layers, stock.layers):
        assert ours.keys.shape == theirs.keys.shape and ours.values.dtype == theirs.values.dtype
        assert (ours.keys - theirs.keys).abs().max() < 0.05 * theirs.keys.abs().max()
    nbytes = cache.nbytes
    assert cache.layers[0].values is not None and cache.nbytes == nbytes, "expanded for the moment"


def test_layers_that_no_tensor_holds():
    cache = kv.EvictionCache("adakv", ratio=0.5, window=4, scorer="keydiff", **KNOBS)
    replay(new_model(ARCHITECTURES["llama"]()), cache, prompt(1, 90), [90])
    with pytest.raises(ValueError, match="heads keep different numbers of rows"):
        _ = cache.layers[0].keys
