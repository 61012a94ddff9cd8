"""A cache travels by pickle, torch.save, deepcopy and to other processes, and goes on there as it would here."""

import copy
import gc
import io
import multiprocessing
import pickle
import pickletools

import pytest
import torch
from cases import AnyBases, assert_same_state, prompt, tiny_model
from rooms import telling
from test_persist import CACHES, fill, go_on, make_model
from test_persist import prompt as text

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument

SHARED = {
    "lowrank-shared": lambda: kv.LowRankCache(0.25, share_layers=2, window=8),
    "lowrank-shared-quant4": lambda: kv.LowRankCache(0.25, bits=4, share_layers=3, rope="post", window=8),
}
EVERY = CACHES | SHARED
# what goes through another process: a kind of every store
TRAVELLERS = {
    name: EVERY[name]
    for name in (
        "dense", "quant4", "sparse", "lowrank", "lowrank-shared", "keydiff", "rerotated", "snapkv", "expected", "adakv",
        "adakv+quant8", "duo",
    )
}  # fmt: skip


def by_pickle(cache):
    return pickle.loads(pickle.dumps(cache))


def by_torch(cache):
    file = io.BytesIO()
    torch.save({"cache": cache}, file)
    file.seek(0)
    return torch.load(file, weights_only=False)["cache"]


WAYS = {"pickle": by_pickle, "torch.save": by_torch, "deepcopy": copy.deepcopy, "copy": copy.copy}


@pytest.fixture(scope="module")
def model():
    return make_model()


@torch.no_grad()
def continued(cache, model=None, steps=24):
    """Greedy tokens after a cache, of the model that every process can make for itself."""
    model = make_model() if model is None else model
    token, found = torch.full((2, 1), 5), []
    for _ in range(steps):
        token = model(token, **cache_argument(cache)).logits[:, -1:].argmax(-1)
        found.append(token[:, 0].tolist())
    return found


@pytest.fixture(scope="module")
def child():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


@pytest.mark.parametrize("make", TRAVELLERS.values(), ids=TRAVELLERS)
def test_another_process_goes_on(model, child, make):
    cache = fill(model, make(), text(120))
    kept = copy.deepcopy(cache)
    theirs = child.apply(continued, (cache,))
    assert len({token for step in theirs for token in step}) > 3
    # the other process has written rows of its own: not into ours
    assert_same_state(cache, kept)
    assert theirs == continued(by_pickle(cache)) == continued(kept, model)


@pytest.mark.parametrize("way", telling(WAYS.values(), by_pickle, copy.deepcopy), ids=WAYS)
@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_copies_go_on_alike(model, make, way):
    cache = fill(model, make(), text(120))
    other = way(cache)
    assert type(other) is type(cache) and repr(other.policy) == repr(cache.policy) and other.codec == cache.codec
    assert_same_state(other, cache)
    # spare rows and tables of RoPE stay behind, and nothing is there twice
    assert other.nbytes <= cache.nbytes
    assert other.nbytes_dense == cache.nbytes_dense
    twin = way(other)
    assert twin.nbytes == other.nbytes
    ours, theirs = go_on(model, cache), go_on(model, other)
    assert torch.equal(ours, theirs)
    assert_same_state(other, cache)


@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_shared_rows_stay_shared(model, make):
    cache = fill(model, make(), text(200))
    ours, theirs = ([layer.store for layer in each.layers] for each in (cache, by_pickle(cache)))
    assert ours[0].n_packed
    for store in theirs:
        assert (store.packed is theirs[0].packed) == (store in theirs[0].group)
        assert store.group.index(store) == ours[theirs.index(store)].group.index(ours[theirs.index(store)])
        assert store.lowrank("k").basis.down is store.group[0].lowrank("k").basis.down
    exact = [
        sum(t.numel() * t.element_size() for buffer in s.buffers().values() for t in buffer.views().values())
        + sum(t.nbytes for side in ("keys", "values") for t in s.constants(side).values())
        for s in ours
    ]
    assert [store.nbytes for store in theirs] == exact


@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "mistral-window8"])
def test_hybrid_models(arch):
    model = tiny_model(arch)
    cache = fill(model, kv.QuantCache(4, window=8), prompt(2, 60))
    other = by_pickle(cache)
    assert [type(layer) for layer in other.layers] == [type(layer) for layer in cache.layers]
    tail = prompt(2, 12, seed=3)
    with torch.no_grad():
        assert torch.equal(model(tail, **cache_argument(other)).logits, model(tail, **cache_argument(cache)).logits)


def test_an_empty_cache(model):
    for cache in (kv.QuantCache(4, window=16), kv.QuantCache(4, window=16, config=model.config)):
        other = fill(model, by_pickle(cache), text())
        assert_same_state(other, fill(model, cache, text()))
        assert other.layers[0].store.n_packed


def test_bases_travel_and_are_taken_up_again():
    model, bases = tiny_model(), AnyBases(rope="post")
    cache = fill(model, kv.LowRankCache(bases=bases, window=8), prompt(2, 60))
    other = by_pickle(cache)
    for each in (cache, other):
        each.reset()
        fill(model, each, prompt(2, 60, seed=4))
    assert_same_state(other, cache)
    assert not other.layers[0].store.keys.constants_in_cache


# -- whose tokens they are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [by_pickle, by_torch], ids=["pickle", "torch.save"])
def test_another_model_is_refused(model, way):
    other = way(fill(model, kv.QuantCache(4), text()))
    with pytest.raises(kv.CacheFileError, match="another model .differs in: weights"):
        make_model(seed=1)(text(1), **cache_argument(other))
    # one with the same weights is the same
    make_model()(text(1), **cache_argument(other))


def test_a_copy_of_a_copy_still_knows_its_model(model):
    other = by_pickle(by_pickle(fill(model, kv.KVCache(), text())))
    with pytest.raises(kv.CacheFileError, match="another model"):
        make_model(seed=1)(text(1), **cache_argument(other))


def test_a_model_that_is_gone(tmp_path):
    cache = fill(make_model(seed=3), kv.KVCache(), text())
    # transformers leaves cycles behind
    gc.collect()
    for leave in (pickle.dumps, lambda cache: cache.save(tmp_path)):
        with pytest.raises(ValueError, match="the model that filled this cache is gone"):
            leave(cache)
    cache.rebind()
    assert by_pickle(cache).get_seq_length() == 90


def test_nothing_of_the_model_is_in_a_pickle(model):
    cache = fill(model, kv.EvictionCache("expected_attention", budget=48), text())
    data = pickle.dumps(cache)
    names = {arg for op, arg, _ in pickletools.genops(data) if isinstance(arg, str)}
    assert not [
        name for name in names if name.startswith("transformers.models") or "Parameter" in name or "nn." in name
    ]
    assert not {"RotaryTables", "Rope"} & names
    weights = model.model.layers[0].self_attn.k_proj.weight.detach().numpy().tobytes()
    assert weights[:64] not in data
    held = sum(t.nbytes for layer in cache.layers for b in layer.store.buffers().values() for t in b.views().values())
    assert len(data) < held + 20_000


def test_spare_rows_and_the_rest_of_a_batch_stay_behind(model):
    cache = fill(model, kv.KVCache(max_length=4000), text())
    assert by_pickle(cache).nbytes < cache.nbytes / 20


def test_a_cache_with_offloading_says_what_to_do(model):
    cache = fill(model, kv.KVCache(offloading=True), text())
    with pytest.raises(ValueError, match="offloading=True .* save\\(\\) it to a folder"):
        pickle.dumps(cache)
    assert_same_state(copy.deepcopy(cache), cache)
