"""What files and copies carry beside plain rows: values of another width than keys, and keys before rotation."""

import copy
import json
import pickle

import pytest
import torch
from cases import assert_close, assert_same_state, generate, new_model, prompt, replay, tiny_model
from transformers import DeepseekV3Config, DynamicCache

import hf_kvcache as kv
from hf_kvcache import persist
from hf_kvcache.manifest import read_manifest
from hf_kvcache.rerotation import ORIGINAL
from hf_kvcache.typed import Misfit

N = 90
LATENTS = {
    "lossless": lambda: kv.KVCache(),
    "quant8": lambda: kv.QuantCache(8, window=8),
    "quant4-edge8": lambda: kv.QuantCache(4, window=8, edge_layers=1),
    "sparse": lambda: kv.SparseCache(0.5, window=8),
    "keydiff": lambda: kv.EvictionCache("keydiff", budget=40, n_recent=8, interval=2),
}
WAYS = {
    "file": lambda cache, model, folder: kv.KVCache.load(cache.save(folder), model=model),
    "file-late": lambda cache, model, folder: kv.KVCache.load(cache.save(folder)),
    "pickle": lambda cache, model, folder: pickle.loads(pickle.dumps(cache)),
    "deepcopy": lambda cache, model, folder: copy.deepcopy(cache),
}
COMPACT = {
    "streaming": lambda: kv.EvictionCache("streaming", budget=40, n_recent=8, interval=4, rerotate_keys=True),
    "keydiff": lambda: kv.EvictionCache("keydiff", budget=40, n_recent=8, interval=4, rerotate_keys=True),
    "adakv": lambda: kv.EvictionCache(
        "adakv", scorer="keydiff", budget=56, n_recent=8, interval=4, window=4, rerotate_keys=True
    ),
}


@pytest.fixture(scope="module")
def latent_model():
    """DeepSeek V3: one head of latents of 32 channels and of rotary keys of 8, which stand for keys and values."""
    config = DeepseekV3Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        first_k_dense_replace=3,
        kv_lora_rank=32,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        pad_token_id=0,
    )
    return new_model(config)


def go_on(model, cache, n=40):
    return replay(model, cache, prompt(2, n, seed=7), [1] * n)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("make", LATENTS.values(), ids=LATENTS)
def test_values_of_another_width(latent_model, make, way, tmp_path):
    cache = make()
    replay(latent_model, cache, prompt(2, N), [N])
    layer = cache.layers[0]
    assert layer.v_head_dim != layer.head_dim
    other = way(cache, latent_model, tmp_path)
    assert [(each.head_dim, each.v_head_dim) for each in other.layers] == [(layer.head_dim, layer.v_head_dim)] * 3
    assert other.nbytes_dense == cache.nbytes_dense and other.nbytes <= cache.nbytes
    assert_same_state(other, cache)
    assert torch.equal(go_on(latent_model, other), go_on(latent_model, cache))
    assert_same_state(other, cache)


def test_bytes_of_a_dense_cache(latent_model):
    cache, dense = kv.KVCache(), DynamicCache()
    for each in (cache, dense):
        replay(latent_model, each, prompt(2, N), [N])
    assert cache.nbytes_dense == sum(t.nbytes for layer in dense.layers for t in (layer.keys, layer.values))


@pytest.fixture
def saved(latent_model, tmp_path):
    cache = kv.QuantCache(8, window=8)
    replay(latent_model, cache, prompt(2, N), [N])
    raw = json.loads((cache.save(tmp_path) / "manifest.json").read_text())
    assert raw["nbytes_dense"] == cache.nbytes_dense
    return raw, persist._read_tensors(tmp_path, read_manifest(raw))


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "v_head_dim: 0"), (10**9, "v_head_dim"), (7, "nbytes_dense"), ("8", "v_head_dim"), (None, "nbytes_dense")],
    ids=str,
)
def test_a_wrong_width_is_named(saved, value, said):
    raw, tensors = saved
    raw["layers"][1]["v_head_dim"] = value
    with pytest.raises(Misfit, match=said):
        persist.assemble(kv.KVCache, read_manifest(raw), tensors)


def test_a_wrong_width_with_the_right_sum(saved):
    raw, tensors = saved
    for entry in raw["layers"]:
        entry["head_dim"], entry["v_head_dim"] = entry["v_head_dim"], entry["head_dim"]
    with pytest.raises(Misfit, match=r"layers\[0\].*\.(k|v)"):
        persist.assemble(kv.KVCache, read_manifest(raw), tensors)


def test_files_that_say_nothing_of_values(tmp_path):
    model, cache = tiny_model(), kv.QuantCache(8, window=8)
    replay(model, cache, prompt(2, N), [N])
    path = cache.save(tmp_path) / "manifest.json"
    raw = json.loads(path.read_text())
    for entry in raw["layers"]:
        assert entry.pop("v_head_dim") == entry["head_dim"]
        assert entry.pop("states", None) is None
    path.write_text(json.dumps(raw))
    assert_same_state(kv.KVCache.load(tmp_path, model=model), cache)


def test_what_was_handed_out_stays_behind(latent_model, tmp_path):
    cache = kv.KVCache()
    replay(latent_model, cache, prompt(2, N), [N])
    # a pass that failed between cache and attention
    view, _ = cache.update(
        torch.randn(2, 1, 1, cache.layers[0].head_dim), torch.randn(2, 1, 1, cache.layers[0].v_head_dim), 0
    )
    view.tensors()
    assert cache.handed is not None
    for name, way in WAYS.items():
        assert way(cache, latent_model, tmp_path / name).handed is None
    assert cache.handed is not None


# -- rerotate_keys=True in 16 bits -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def half_model(request):
    return tiny_model(dtype=request.param)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("make", COMPACT.values(), ids=COMPACT)
def test_keys_before_rotation_travel(half_model, make, way, tmp_path):
    cache = make()
    # decoded on, so that rows are packed in pages, where there are some
    replay(half_model, cache, prompt(2, N), [N - 10] + [1] * 10)
    other = way(cache, half_model, tmp_path)
    store = other.layers[0].store
    assert store.tracked[ORIGINAL] == half_model.dtype and ORIGINAL in store.dense.tensors
    assert not store.is_ragged or store.packed.n_rows and ORIGINAL in store.packed.tensors
    assert_same_state(other, cache)
    assert torch.equal(go_on(half_model, other), go_on(half_model, cache))
    assert_same_state(other, cache)
    assert other.nbytes <= cache.nbytes


@pytest.mark.parametrize("make", COMPACT.values(), ids=COMPACT)
def test_beams_of_keys_before_rotation(half_model, make):
    cache, alone = make(), make()
    replay(half_model, cache, prompt(3, N), [N])
    cache.batch_select_indices([2, 0])
    cache.batch_repeat_interleave(2)
    replay(half_model, alone, prompt(3, N)[[2, 2, 0, 0]], [N])
    original = [each.layers[0].store.state(ORIGINAL) for each in (cache, alone)]
    assert torch.equal(*original)
    ids = prompt(4, 30, seed=7)
    assert_close("logits", *(replay(half_model, each, ids, [1] * 30) for each in (cache, alone)), 0.3)
    found = generate(half_model, prompt(1, 60), make(), num_beams=3, max_new_tokens=12)
    assert found.sequences.shape == (1, 72)


@pytest.mark.parametrize("make", COMPACT.values(), ids=COMPACT)
def test_the_next_text_may_be_of_another_dtype(half_model, make):
    model, cache, fresh = tiny_model(), make(), make()
    replay(half_model, cache, prompt(2, N), [N])
    cache.reset()
    for each in (cache, fresh):
        replay(model, each, prompt(2, N), [N])
    assert ORIGINAL not in cache.layers[0].store.tracked
    assert_same_state(cache, fresh)
    assert torch.equal(go_on(model, cache), go_on(model, fresh))


def test_files_without_keys_before_rotation(half_model, tmp_path):
    cache = COMPACT["streaming"]()
    replay(half_model, cache, prompt(2, N), [N])
    raw = json.loads((cache.save(tmp_path) / "manifest.json").read_text())
    tensors = persist._read_tensors(tmp_path, read_manifest(raw))
    left = {name: t for name, t in tensors.items() if ORIGINAL not in name}
    assert left.keys() < tensors.keys()
    with pytest.raises(Misfit, match=r"layers\[0\]: the file has no keys as they were appended"):
        persist.assemble(kv.KVCache, read_manifest(raw), left)
    odd = {name: t[..., :-1] if ORIGINAL in name else t for name, t in tensors.items()}
    with pytest.raises(Misfit, match=r"layers\[0\].dense.original"):
        persist.assemble(kv.KVCache, read_manifest(raw), odd)
