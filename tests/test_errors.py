"""Bad input: a clear error that names what to do, or the behaviour of a dense cache."""

import copy

import pytest
import torch
from cases import CASES, KNOBS, SIZES, generate, new_model, prompt, replay, tiny_model
from transformers import DynamicCache, LlamaConfig

import hf_kvcache as kv
from hf_kvcache.attention.call import AttentionCall
from hf_kvcache.compat import cache_argument


def rows(n=4, batch=1, heads=2, width=16, dtype=torch.float32):
    return torch.zeros(batch, heads, n, width, dtype=dtype)


ARGUMENTS = {
    "bits5": (lambda: kv.QuantCache(5), ValueError, "bits=5 is not one of 2, 3, 4, 8"),
    "axis": (lambda: kv.QuantCache(4, key_axis="row"), ValueError, "axis='row' is neither"),
    "window": (lambda: kv.KVCache(window=-1), ValueError, "window=-1, .*must not be\\s+negative"),
    "no-budget": (lambda: kv.KeyDiff(), ValueError, "KeyDiff: give either budget= .* or ratio="),
    "both": (lambda: kv.Streaming(budget=99, ratio=0.5), ValueError, "Streaming: give either budget="),
    "ratio": (lambda: kv.KeyDiff(ratio=1.5), ValueError, r"ratio=1.5 is not in \(0, 1\]"),
    "budget": (lambda: kv.KeyDiff(budget=8), ValueError, "budget=8 leaves nothing to choose.*4 \\+ 32"),
    "interval": (lambda: kv.KeyDiff(budget=99, interval=0), ValueError, "interval must be at least 1"),
    "policy-type": (lambda: kv.KVCache(policy="keydiff"), TypeError, "policy must be a Policy .* not 'keydiff'"),
    "codec-type": (lambda: kv.KVCache(codec=4), TypeError, "codec must be a Codec such as Quantize"),
    "codec-pair": (lambda: kv.KVCache(codec=(kv.Quantize(4), None)), TypeError, "or a pair of them"),
    "unknown": (lambda: kv.EvictionCache("snappy", budget=99), ValueError, "no method is called 'snappy'; there are"),
    "not-evicting": (lambda: kv.EvictionCache("quant"), ValueError, "'quant' is not an eviction method"),
    "knobs": (lambda: kv.EvictionCache(kv.KeyDiff(budget=99), budget=9), TypeError, "budget: give the arguments"),
    "min_length": (
        lambda: kv.SparseCache(policy=kv.KeyDiff(budget=512), min_length=1024),
        ValueError,
        "KeyDiff: budget=512 is below min_length=1024, so nothing would ever be packed",
    ),
    "min_length alone": (lambda: kv.KVCache(min_length=64), ValueError, "without a codec nothing is packed"),
    "edge_layers alone": (lambda: kv.KVCache(edge_layers=1), ValueError, "exempts layers from the codec"),
    "edge_codec alone": (lambda: kv.KVCache(edge_codec=kv.Quantize(8)), ValueError, "say how many with edge_layers"),
    "three shares": (lambda: kv.SparseCache((0.5, 0.5, 0.5)), ValueError, "neither a share, a pair of shares"),
    "sparsity": (lambda: kv.SparseCache(1.0), ValueError, "sparsity=1.0 is not in"),
    "sparsity name": (lambda: kv.SparseCache("0.5"), ValueError, "neither a share.*nor 'balanced'"),
    "share and count": (lambda: kv.Sparse(0.5, keep=8), ValueError, "either sparsity=.*or keep="),
    "layout": (lambda: kv.Sparse(0.5, layout="csr"), ValueError, "layout='csr' is not one of bitmap, index"),
    "rule": (lambda: kv.Sparse(0.5, rule="random"), ValueError, "rule='random' is not one of magnitude"),
    "sparse over a channel scale": (
        lambda: kv.Sparse(0.5) >> kv.Quantize(4, axis="channel"),
        ValueError,
        "Sparse >> Quantize: .*channels that Sparse.*differ from row to row",
    ),
    "sparse over a rotation": (
        lambda: kv.Sparse(0.5) >> kv.Quantize(4, rotate=True),
        ValueError,
        "Sparse >> Quantize: .*rotate=False",
    ),
    "blocks under a policy": (
        lambda: kv.KVCache(kv.KeyDiff(budget=256), (kv.Sparse(0.5), kv.Sparse(0.5, axis="channel"))),
        ValueError,
        "KeyDiff drops single tokens, but Sparse.* packs 32 tokens",
    ),
    "chain": (
        lambda: kv.Quantize(8) >> kv.Quantize(4),
        ValueError,
        "Quantize >> Quantize: Quantize.*leaves nothing.*put it last",
    ),
    "budget-under-window": (
        lambda: kv.QuantCache(4, window=64, policy=kv.KeyDiff(budget=96)),
        ValueError,
        "KeyDiff: budget=96 leaves no room for packed rows beside up to 96 dense ones.*raise budget or lower window",
    ),
    "policy-over-blocks": (
        lambda: kv.KVCache(policy=kv.KeyDiff(budget=99), codec=kv.Quantize(4)),
        ValueError,
        "KeyDiff drops single tokens, but Quantize.* packs 32 tokens together; use a row-granular codec",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name):
    make, error, message = ARGUMENTS[name]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_that_do_not_fit(case):
    cache = case.make()
    view, _ = cache.update(rows(), rows(), 0)
    view.layer.compress(AttentionCall(view, rows(heads=4)))
    wrong = {
        "the input is empty": rows(0),
        "batch size of the new tokens is 2, of the cache 1": rows(batch=2),
        "KV heads of the new tokens is 3, of the cache 2": rows(heads=3),
        "head size of the new tokens is 32, of the cache 16": rows(width=32),
        "dtype of the new tokens is torch.float16": rows(dtype=torch.float16),
        "keys are torch.int64": rows(dtype=torch.int64),
        r"must be \[B, Hkv, S, D\]": rows()[0],
    }
    for message, x in wrong.items():
        with pytest.raises(ValueError, match=f"layer 0: .*{message}"):
            cache.update(x, x, 0)
    # a refused call leaves the cache as it was
    assert cache.get_seq_length() == 4
    cache.update(rows(1), rows(1), 0)
    assert cache.get_seq_length() == 5


def test_head_size_that_cannot_be_packed():
    model = new_model(LlamaConfig(**SIZES | {"head_dim": 12}))
    with pytest.raises(ValueError, match="layer 0 cannot be encoded: 3-bit rows need a head size .* multiple of 16"):
        generate(model, prompt(), kv.QuantCache(3))
    with pytest.raises(ValueError, match="group_size=7 does not divide the head size 16"):
        generate(tiny_model(), prompt(), kv.QuantCache(4, group_size=7))


@pytest.mark.parametrize("implementation", ["hf_kvcache", "sdpa"])
def test_another_batch_size(implementation):
    model, cache = tiny_model("llama", implementation), kv.QuantCache(4)
    generate(model, prompt(2), cache)
    with pytest.raises(ValueError, match="batch size of the new tokens is 3, of the cache 2; use a new cache"):
        model(prompt(3), **cache_argument(cache))


@pytest.mark.parametrize("implementation", ["hf_kvcache", "sdpa"])
def test_another_model(implementation):
    model, cache = tiny_model("llama", implementation), kv.KVCache()
    replay(model, cache, prompt(), [60])
    other = tiny_model("llama", implementation, seed=1)
    with pytest.raises(ValueError, match="tokens of another model; use a new cache, reset.*rebind"):
        replay(other, cache, prompt(1, 5), [5])
    twin, cache = copy.deepcopy(model), kv.KVCache()
    logits = replay(model, cache, prompt(), [60])
    cache.crop(-5)
    cache.rebind()
    again = replay(twin, cache, prompt()[:, -5:], [5])
    assert (again - logits[:, -5:]).abs().max() < 1e-5
    cache.reset()
    replay(other, cache, prompt(), [60])


@pytest.mark.parametrize("implementation", ["hf_kvcache", "sdpa"])
def test_empty_prompt(implementation):
    model, cache = tiny_model("llama", implementation), kv.KVCache()
    for _ in range(2):
        with pytest.raises(ValueError, match="the input is empty; a forward pass needs at least one token"):
            model(torch.zeros(1, 0, dtype=torch.long), **cache_argument(cache))
        # and again with a filled cache
        replay(model, cache, prompt(1, 5), [5])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nan_behaves_as_in_a_dense_cache(case):
    # a NaN in one row of the batch: that row's logits are NaN, the other row's are not touched, nothing hangs
    model, cache = tiny_model(), case.make()
    embedded = model.get_input_embeddings()(prompt(2)).clone()
    embedded[0, 5] = float("nan")
    out = model(inputs_embeds=embedded, **cache_argument(cache)).logits
    dense = model(inputs_embeds=embedded, **cache_argument(DynamicCache())).logits
    assert torch.equal(out.isnan(), dense.isnan())
    later = [model(prompt(2, 1), **cache_argument(cache)).logits for _ in range(8)]
    assert not any(x[1].isnan().any() for x in later)
    if not case.evicts:
        assert all(x[0].isnan().all() for x in later)


def test_positive_crop():
    cache = kv.KVCache()
    replay(tiny_model(), cache, prompt(), [60])
    with pytest.raises(ValueError, match="zero or negative"):
        cache.crop(5)


def test_crop_of_what_was_evicted():
    cache = kv.EvictionCache("keydiff", budget=24, **KNOBS)
    replay(tiny_model(), cache, prompt(), [60])
    with pytest.raises(ValueError, match=r"cannot crop 9 tokens: KeyDiff has .*raise n_recent \(now 8\)"):
        cache.crop(-9)
    # refused before anything changed
    assert cache.get_seq_length() == 60
    cache.crop(-8)


def test_linear_attention_needs_the_config():
    with pytest.raises(ValueError, match=r"construct QuantCache\(..., config=model.config"):
        kv.QuantCache(4).update_conv_state(torch.zeros(1, 4, 4), 0)
