"""A saved cache goes on as if it had never been saved, and refuses what it is not."""

import gc
import json
import pickle

import pytest
import torch
from cases import AnyBases, assert_same_state, new_policies, tiny_model
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3NextConfig

import hf_kvcache as kv
from hf_kvcache import persist
from hf_kvcache.attention.call import AttentionCall
from hf_kvcache.compat import cache_argument
from hf_kvcache.dmc.hooks import Call
from hf_kvcache.dmc.settings import Settings

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": None,
}
CACHES = {
    "dense": lambda: kv.KVCache(),
    "quant4": lambda: kv.QuantCache(4, window=16),
    "quant3-rotated": lambda: kv.QuantCache(3, window=16, rotate=True),
    "quant2-edge8": lambda: kv.QuantCache(2, window=16, edge_layers=1),
    "sparse": lambda: kv.SparseCache("balanced", window=16, min_length=60),
    "sparse-index-quant4": lambda: kv.SparseCache(0.5, bits=4, layout="index", window=16),
    # the newest queries are part of the state
    "sparse-think": lambda: kv.SparseCache(0.5, rule="think", window=16),
    "sparse-channel-v": lambda: kv.KVCache(codec=(kv.Sparse(0.5), kv.Sparse(0.5, axis="channel")), window=16),
    # a basis that was fitted to the prompt is part of the state
    "lowrank": lambda: kv.LowRankCache(0.5, window=16),
    "lowrank-post-quant4": lambda: kv.LowRankCache(0.5, bits=4, rope="post", group_size=(1, "all"), window=16),
    "lowrank-inexact": lambda: kv.LowRankCache(0.5, window=16, exact_prefill=False),
    "keydiff": lambda: kv.EvictionCache("keydiff", budget=40, n_recent=8, interval=4),
    "rerotated": lambda: kv.EvictionCache("streaming", budget=40, n_recent=8, interval=4, rerotate_keys=True),
    # what a policy remembers, per row and beside the rows, and the newest queries are part of the state
    "h2o": lambda: kv.EvictionCache("h2o", budget=40, n_recent=8, interval=4),
    "snapkv": lambda: kv.EvictionCache("snapkv", budget=40, n_recent=8, n_queries=8, interval=4),
    "expected": lambda: kv.EvictionCache("expected_attention", budget=40, n_recent=8, interval=4),
    "merge": lambda: kv.EvictionCache("keydiff", budget=40, n_recent=8, interval=4, merge=True),
    # and so are pages, and when heads were last looked at
    "adakv": lambda: kv.EvictionCache("adakv", budget=44, scorer="keydiff", n_recent=8, interval=12),
    "adakv-rerotated": lambda: kv.EvictionCache(
        "adakv", budget=44, scorer="h2o", n_recent=8, interval=4, rerotate_keys=True
    ),
    "adakv+quant8": lambda: kv.QuantCache(8, window=8, policy=kv.AdaKV(budget=48, scorer="keydiff", n_recent=8)),
    "fastgen": lambda: kv.EvictionCache("fastgen", recovery=0.5, n_recent=8, interval=4),
    "duo": lambda: kv.EvictionCache("duo", gates=[[1, 0], [0, 1], [1, 1]], n_recent=8, interval=4),
    "duo-roomy": lambda: kv.EvictionCache("duo", gates=[[0, 0]] * 3, n_recent=95, interval=12),
    "streaming+quant8": lambda: kv.QuantCache(8, window=8, policy=kv.Streaming(budget=48, n_recent=8, interval=4)),
}
CACHES |= new_policies(make().policy for make in CACHES.values())


def make_model(config_class=LlamaConfig, seed=0, **changes):
    torch.manual_seed(seed)
    config = config_class(**SHAPE | changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="hf_kvcache").eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def prompt(n=90, batch=2):
    return torch.randint(3, 96, (batch, n), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def fill(model, cache, ids):
    model(ids, **cache_argument(cache))
    return cache


@torch.no_grad()
def go_on(model, cache, steps=40):
    ids, logits = prompt(n=steps), []
    for token in ids.split(1, 1):
        logits.append(model(token, **cache_argument(cache)).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_continuation_is_the_same(model, make, tmp_path):
    cache = fill(model, make(), prompt())
    cache.save(tmp_path / "prompt")
    loaded = kv.KVCache.load(tmp_path / "prompt", model=model)
    assert loaded.get_seq_length() == 90
    assert loaded.nbytes <= cache.nbytes
    assert torch.equal(go_on(model, loaded), go_on(model, cache))


def test_a_loaded_cache_can_be_cropped_at_once(model, tmp_path):
    cache = fill(model, kv.LowRankCache(0.5, window=8), prompt(n=200))
    cache.save(tmp_path)
    loaded = kv.KVCache.load(tmp_path, model=model)
    for each in (cache, loaded):
        each.crop(-120)
    assert torch.equal(go_on(model, loaded), go_on(model, cache))
    with pytest.raises(ValueError, match="load the cache with model="):
        kv.KVCache.load(tmp_path).crop(-120)


def test_hybrid_model(tmp_path):
    model = make_model(Gemma2Config, sliding_window=16)
    cache = fill(model, kv.QuantCache(8, window=16), prompt())
    cache.save(tmp_path)
    with pytest.raises(kv.CacheFileError, match="load it with model="):
        kv.KVCache.load(tmp_path)
    assert torch.equal(go_on(model, kv.KVCache.load(tmp_path, model=model)), go_on(model, cache))


def test_saving_again_replaces_the_old_cache(model, tmp_path):
    fill(model, kv.QuantCache(4), prompt(n=120)).save(tmp_path)
    fill(model, kv.QuantCache(4), prompt(n=64)).save(tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert kv.KVCache.load(tmp_path).get_seq_length() == 64


def test_an_interrupted_save_leaves_the_old_cache(model, tmp_path, monkeypatch):
    fill(model, kv.QuantCache(4), prompt(n=120)).save(tmp_path)
    longer = fill(model, kv.QuantCache(4), prompt(n=130))

    def broken(tensors, path):
        path.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(persist, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        longer.save(tmp_path)
    assert kv.KVCache.load(tmp_path, model=model).get_seq_length() == 120
    assert len(list(tmp_path.iterdir())) == 2


class TestRefusals:
    @pytest.fixture
    def saved(self, model, tmp_path):
        return fill(model, kv.QuantCache(4), prompt()).save(tmp_path)

    def tensors(self, saved):
        return next(saved.glob("*.safetensors"))

    def edit(self, saved, **changes):
        path = saved / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def test_nothing_there(self, tmp_path):
        with pytest.raises(kv.CacheFileError, match="manifest.json is missing"):
            kv.KVCache.load(tmp_path)

    def test_truncated(self, saved):
        path = self.tensors(saved)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(kv.CacheFileError, match=f"{path.name} is truncated or altered"):
            kv.KVCache.load(saved)

    def test_one_flipped_bit(self, saved):
        path = self.tensors(saved)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(kv.CacheFileError, match="truncated or altered"):
            kv.KVCache.load(saved)

    def test_missing_tensors(self, saved):
        self.tensors(saved).unlink()
        with pytest.raises(kv.CacheFileError, match="is missing"):
            kv.KVCache.load(saved)

    def test_damaged_manifest(self, saved):
        (saved / "manifest.json").write_text("{")
        with pytest.raises(kv.CacheFileError, match="is damaged"):
            kv.KVCache.load(saved)

    def test_newer_format(self, saved):
        self.edit(saved, format_version=99)
        with pytest.raises(kv.CacheFileError, match="has format 99"):
            kv.KVCache.load(saved)

    def test_a_path_instead_of_a_name(self, saved):
        self.edit(saved, tensors="../elsewhere.safetensors")
        with pytest.raises(kv.CacheFileError, match="no cache would write"):
            kv.KVCache.load(saved)

    def test_other_shapes(self, saved):
        self.edit(saved, shapes={})
        with pytest.raises(kv.CacheFileError, match="does not hold the tensors"):
            kv.KVCache.load(saved)

    def test_other_weights(self, saved):
        other = make_model(seed=1)
        with pytest.raises(kv.CacheFileError, match="another model .differs in: weights"):
            kv.KVCache.load(saved, model=other)
        late = kv.KVCache.load(saved)
        with pytest.raises(kv.CacheFileError, match="another model"):
            other(prompt(n=1), **cache_argument(late))

    def test_other_depth(self, saved):
        with pytest.raises(kv.CacheFileError, match="num_hidden_layers"):
            kv.KVCache.load(saved, model=make_model(num_hidden_layers=2))


class TestNothingIsLost:
    """Options and state that a cache would go on without, and nobody would notice."""

    def both(self, model, cache, folder):
        cache.save(folder)
        return kv.KVCache.load(folder, model=model)

    @pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
    def test_saving_changes_nothing(self, model, make, tmp_path):
        cache, twin = (fill(model, make(), prompt()) for _ in range(2))
        cache.save(tmp_path)
        assert torch.equal(go_on(model, cache), go_on(model, twin))

    def test_an_empty_cache_keeps_its_codec(self, model, tmp_path):
        cache = kv.QuantCache(4, window=16, edge_layers=1, edge_bits=8)
        loaded = self.both(None, cache, tmp_path)
        assert (loaded.codec, loaded.edge_codec, loaded.edge_layers) == (cache.codec, cache.edge_codec, 1)
        assert fill(model, loaded, prompt()).nbytes == fill(model, cache, prompt()).nbytes

    def test_class_and_own_attributes(self, tmp_path):
        loaded = self.both(None, kv.LocretCache(budget=200, chunk=48, local=8), tmp_path)
        assert type(loaded) is kv.LocretCache and loaded.chunk == 48
        loaded.note = object()
        with pytest.raises(ValueError, match="LocretCache.note is a object, which a file cannot hold"):
            loaded.save(tmp_path)

    def test_a_new_text_is_fitted_anew(self, model, tmp_path):
        cache = fill(model, kv.LowRankCache(0.5, window=8), prompt(n=200))
        loaded = self.both(model, cache, tmp_path)
        for each in (cache, loaded):
            each.reset()
            fill(model, each, prompt(n=150).flip(1))
        assert torch.equal(go_on(model, loaded), go_on(model, cache))

    def test_bases_are_not_replaced_without_a_word(self, tmp_path):
        model = tiny_model()
        loaded = self.both(model, fill(model, kv.LowRankCache(bases=AnyBases(), window=8), prompt()), tmp_path)
        with torch.no_grad():
            model(prompt(n=5), **cache_argument(loaded))
            loaded.reset()
            with pytest.raises(ValueError, match="a saved cache does not hold"):
                model(prompt(), **cache_argument(loaded))

    @pytest.mark.parametrize("name", ["h2o", "snapkv", "expected", "adakv", "quant4", "merge"])
    def test_what_waits_for_a_crop(self, model, name, tmp_path):
        cache = CACHES[name]()
        cache.activate_past_recording()
        fill(model, fill(model, cache, prompt()), prompt(n=12))
        assert any(layer._is_unsettled for layer in cache.layers)
        loaded = self.both(model, cache, tmp_path)
        for each in (cache, loaded):
            each.crop(-5)
            fill(model, each, prompt(n=3))
            each.crop(-1)
        assert torch.equal(go_on(model, loaded), go_on(model, cache))
        assert loaded._records_past

    def test_a_model_that_was_checked_is_not_forgotten(self, model, tmp_path):
        loaded = self.both(model, fill(model, kv.KVCache(), prompt()), tmp_path / "one")
        again = self.both(None, loaded, tmp_path / "two")
        for each in (loaded, again):
            with pytest.raises(kv.CacheFileError, match="another model"):
                make_model(seed=1)(prompt(n=1), **cache_argument(each))

    def test_linear_attention(self, tmp_path):
        config = Qwen3NextConfig(**SHAPE | LINEAR)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="hf_kvcache").eval()
        cache = fill(model, kv.QuantCache(4, window=16, config=config), prompt())
        loaded = self.both(model, cache, tmp_path)
        assert torch.equal(go_on(model, loaded, 8), go_on(model, cache, 8))

    def test_a_call_that_is_under_way(self, tmp_path):
        cache = kv.DMSCache()
        layer = cache._new_layer(0)
        cache.layers.append(layer)
        layer.start_call(decided(5))
        with pytest.raises(ValueError, match="layer 0 is in the middle of a forward pass"):
            cache.save(tmp_path)
        layer.call = None

    def test_the_window_of_a_retrofit(self, tmp_path):
        cache = kv.DMSCache()
        layer = cache._new_layer(0)
        cache.layers.append(layer)
        for _ in range(3):
            layer.start_call(decided(1))
            k, v = torch.randn(2, 2, 2, 1, 16)
            view = layer.append(k, v)
            layer.place(view)
            layer.compress(AttentionCall(view, torch.randn(2, 4, 1, 16)))
        for other in (self.both(None, cache, tmp_path), pickle.loads(pickle.dumps(cache))):
            assert_same_state(other, cache)
            with pytest.raises(ValueError, match="made with window=4"):
                other.layers[0].start_call(decided(1, window=8))

    def test_two_classes_of_one_name(self, model, tmp_path):
        fill(model, kv.EvictionCache("keydiff", budget=48), prompt()).save(tmp_path)
        other = type("KeyDiff", (kv.KeyDiff,), {"__module__": "elsewhere"})
        with pytest.raises(kv.CacheFileError, match="elsewhere and hf_kvcache.policies.keydiff both have a policy"):
            kv.KVCache.load(tmp_path)
        del other
        gc.collect()
        kv.KVCache.load(tmp_path)


LINEAR = dict(
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    linear_conv_kernel_dim=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    num_experts=0,
    mlp_only_layers=[0, 1, 2],
)


def decided(n, window=4):
    """A call of an attention module that keeps all of `n` tokens."""
    call = Call(Settings("dms", window=window), None, None, False)
    call.alpha = torch.zeros(2, 2, n, dtype=torch.bool)
    call.logits = torch.zeros(2, 2, n)
    call.first = torch.zeros(2, dtype=torch.long)
    return call
