"""Layers with codecs, windows and budgets of their own."""

import copy
import pickle

import pytest
import torch
from cases import prompt, tiny_model

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument
from hf_kvcache.eval import asking
from hf_kvcache.hub.spec import cache_of, spec_of

TEXT, NEXT = prompt(length=160)[0].tolist(), prompt(length=9, seed=2)[0].tolist()


def feed(model, cache, ids):
    return asking.feed(model, cache, torch.tensor([ids]))


def pair(bits, axis=None):
    return kv.Quantize(bits, axis=axis), kv.Quantize(bits, axis="token")


def mixed(**options):
    """Layer 0 keeps all tokens, in blocks of 32 per channel; layer 1 half of them, in rows."""
    own = {0: {"policy": None, "codec": pair(4), "window": 32}, 1: {"ratio": 0.5}}
    return kv.KVCache(kv.KeyDiff(ratio=0.75), pair(8, "token"), window=16, per_layer=own, **options)


def filled(cache, model=None):
    feed(model or tiny_model(), cache, TEXT)
    return cache


def test_each_layer_has_its_own():
    cache = filled(mixed())
    first, second = (layer.store for layer in cache.layers[:2])
    assert (first.keys, first.window, first.n_kept) == (pair(4, "channel")[0], 32, 160)
    assert (second.keys, second.window, second.n_kept) == (pair(8, "token")[0], 16, 80)
    assert cache.layers[0].policy is None and cache.layers[1].policy.ratio == 0.5


def test_what_is_said_of_all_layers_is_what_is_said_of_the_cache():
    plain = filled(kv.KVCache(kv.KeyDiff(ratio=0.5), pair(8, "token"), window=16))
    own = {i: {"ratio": 0.5, "codec": pair(8, "token"), "window": 16} for i in range(len(plain.layers))}
    ours = filled(kv.KVCache(kv.KeyDiff(ratio=1.0), pair(4, "token"), per_layer=own))
    assert ours.nbytes == plain.nbytes
    model = tiny_model()
    assert all(torch.equal(feed(model, ours, [token]), feed(model, plain, [token])) for token in NEXT)


def test_edge_layers_are_a_case_of_it():
    n = len(filled(kv.KVCache()).layers)
    edge = filled(kv.KVCache(codec=pair(2), edge_layers=1, edge_codec=pair(8), window=16))
    ours = filled(kv.KVCache(codec=pair(2), per_layer={i: {"codec": pair(8)} for i in (0, n - 1)}, window=16))
    assert [layer.store.keys for layer in ours.layers] == [layer.store.keys for layer in edge.layers]
    assert ours.nbytes == edge.nbytes


def test_a_wrapped_policy_gets_the_budget_too():
    own = {0: {"ratio": 0.9}}
    cache = filled(kv.KVCache(kv.AdaKV(ratio=0.6, scorer="keydiff", floor=0.0), window=16, per_layer=own))
    counts = [layer.store.packed.counts.float().mean() + layer.store.dense.n_tokens for layer in cache.layers[:2]]
    assert counts[0] == pytest.approx(0.9 * 160, abs=1) and counts[1] == pytest.approx(0.6 * 160, abs=1)
    assert cache.layers[0].policy.scorer.ratio == 0.9


WAYS = {
    "saved": lambda cache, folder: kv.KVCache.load(cache.save(folder)),
    "loaded with the model": lambda cache, folder: kv.KVCache.load(cache.save(folder), model=tiny_model()),
    "pickled": lambda cache, folder: pickle.loads(pickle.dumps(cache)),
    "copied": lambda cache, folder: copy.deepcopy(cache),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_travels(way, tmp_path):
    cache = filled(mixed())
    other = WAYS[way](cache, tmp_path)
    assert other.per_layer == cache.per_layer
    model = tiny_model()
    assert all(torch.equal(feed(model, other, [token]), feed(model, cache, [token])) for token in NEXT)
    # another text, too, is compressed layer by layer
    other.reset()
    assert filled(other).layers[0].store.n_kept == 160 and other.layers[1].store.n_kept == 80


def test_batches_and_crops():
    model, cache = tiny_model(), mixed()
    batch = torch.tensor([TEXT, TEXT[::-1]])
    model(batch, **cache_argument(cache), use_cache=True)
    cache.batch_select_indices([1])
    alone = filled(mixed())
    alone.reset()
    feed(model, alone, TEXT[::-1])
    torch.testing.assert_close(feed(model, cache, NEXT), feed(model, alone, NEXT), rtol=1e-4, atol=1e-5)
    cache.crop(-4)
    assert cache.get_seq_length() == len(TEXT) + len(NEXT) - 4
    # 80 rows of text in layer 1, then nine and not four of them, whatever has been evicted since
    assert cache.layers[0].store.n_kept == len(TEXT) + 5


def test_as_plain_values_and_back():
    cache = mixed()
    spec = spec_of(cache)
    assert spec["per_layer"]["0"]["policy"] is None and spec["per_layer"]["1"] == {"ratio": 0.5}
    again = cache_of(spec)
    assert again.per_layer == cache.per_layer
    assert filled(again).nbytes == filled(cache).nbytes


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: kv.KVCache(per_layer={0: {"bits": 4}}), ValueError, ["per_layer[0]", "bits"]),
        (lambda: kv.KVCache(per_layer={"0": {"window": 4}}), TypeError, ["'0'"]),
        (lambda: kv.KVCache(per_layer={-1: {"window": 4}}), ValueError, ["per_layer[-1]"]),
        (lambda: kv.KVCache(per_layer={0: {"window": -4}}), ValueError, ["per_layer[0]", "window"]),
        (lambda: kv.KVCache(per_layer={0: {"window": 4.0}}), TypeError, ["per_layer[0]", "window"]),
        (lambda: kv.KVCache(per_layer={0: {"ratio": 0.5}}), ValueError, ["per_layer[0]", "ratio", "policy"]),
        (lambda: kv.KVCache(per_layer={0: {"codec": "quant"}}), TypeError, ["quant"]),
        (
            lambda: kv.KVCache(kv.KeyDiff(ratio=0.5), per_layer={3: {"codec": pair(4)}}),
            ValueError,
            ["per_layer[3]", "KeyDiff", "Quantize"],
        ),
        (
            lambda: kv.KVCache(kv.KeyDiff(ratio=0.5), per_layer={3: {"ratio": 0.5, "budget": 64}}),
            ValueError,
            ["per_layer[3]", "ratio", "budget"],
        ),
        (
            lambda: kv.KVCache(kv.PyramidKV(ratio=0.5), per_layer={3: {"ratio": 0.25}}),
            ValueError,
            ["per_layer[3]", "ratio=0.25", "PyramidKV"],
        ),
        (
            lambda: kv.KVCache(kv.KeyDiff(ratio=0.5), per_layer={3: {"policy": kv.H2O(ratio=0.5)}}),
            ValueError,
            ["per_layer[3]", "policy", "ratio"],
        ),
        (
            lambda: kv.KVCache(kv.KeyDiff(budget=512), pair(8, "token"), per_layer={3: {"window": 512}}),
            ValueError,
            ["per_layer[3]", "budget=512", "window=512"],
        ),
        (
            lambda: kv.LowRankCache(0.5, share_layers=2, per_layer={0: {"codec": pair(8)}}),
            ValueError,
            ["per_layer", "share"],
        ),
    ],
)
def test_what_does_not_go_together_is_refused(make, error, words):
    with pytest.raises(error) as raised:
        make()
    assert all(word in str(raised.value) for word in words), raised.value


def test_layers_that_the_model_lacks():
    with pytest.raises(ValueError, match=r"per_layer\[99\]: the model has"):
        filled(kv.KVCache(per_layer={99: {"window": 4}}))
    with pytest.raises(ValueError, match=r"per_layer\[0\]: .*not compressed"):
        filled(kv.KVCache(per_layer={0: {"window": 4}}), tiny_model("gemma3"))
