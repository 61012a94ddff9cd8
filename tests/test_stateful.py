"""Models with linear attention beside full attention: rows are ours, states travel with them."""

import copy
import json
import pickle

import pytest
import torch
from cases import assert_close, assert_same_state, generate, new_model, prompt, replay, tiny_model
from transformers import DeepseekV32Config, DynamicCache, FalconH1Config, Lfm2Config, Qwen3NextConfig, Zamba2Config

import hf_kvcache as kv
from hf_kvcache.compat import LinearAttentionLayer, cache_argument
from hf_kvcache.stateful import StatefulLayer

SIZES = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MAMBA = dict(
    mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8, head_dim=16
)
ZAMBA = dict(
    layers_block_type=["linear_attention", "hybrid", "linear_attention"],
    num_mem_blocks=1,
    adapter_rank=4,
    use_mem_rope=True,
    mamba_d_state=8,
    mamba_ngroups=1,
    n_mamba_heads=4,
    mamba_headdim=16,
    chunk_size=8,
)
DELTA = dict(
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    head_dim=16,
    linear_conv_kernel_dim=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    num_experts=0,
    mlp_only_layers=[0, 1, 2],
)
CONFIGS = {
    "falcon-h1": lambda: FalconH1Config(**SIZES | MAMBA),
    "zamba2": lambda: Zamba2Config(**SIZES | ZAMBA),
    "lfm2": lambda: Lfm2Config(**SIZES, layer_types=["conv", "full_attention", "conv"], block_multiple_of=16),
    "qwen3-next": lambda: Qwen3NextConfig(**SIZES | DELTA),
}
CACHES = {
    "lossless": kv.KVCache,
    "quant8": lambda **options: kv.QuantCache(8, window=8, **options),
    "keydiff": lambda **options: kv.EvictionCache("keydiff", budget=24, n_recent=4, interval=2, **options),
    "adakv": lambda **options: kv.EvictionCache("adakv", budget=40, n_recent=4, interval=2, window=4, **options),
}
N = 50


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return new_model(CONFIGS[request.param]())


@pytest.fixture(scope="module")
def falcon():
    return new_model(CONFIGS["falcon-h1"]())


def filled(model, make, batch=2, length=N, seed=1):
    cache = make(config=model.config)
    replay(model, cache, prompt(batch, length, seed), [length])
    return cache


def states(cache):
    """Every state of linear attention by name."""
    held = {}
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionLayer):
            for kind in ("conv_states", "recurrent_states"):
                held |= {f"{i}.{kind}.{at}": t for at, t in getattr(layer, kind).items() if t is not None}
    return held


def assert_same(cache, other):
    assert_same_state(cache, other)
    ours, theirs = states(cache), states(other)
    assert ours.keys() == theirs.keys() and ours
    for name, t in ours.items():
        assert torch.equal(t, theirs[name]), name


def go_on(model, cache, batch=2):
    return replay(model, cache, prompt(batch, 6, seed=7), [1] * 6)


def loaded(cache, model, folder):
    cache.save(folder)
    return kv.KVCache.load(folder, model=model)


WAYS = {
    "file": loaded,
    "pickle": lambda cache, model, folder: pickle.loads(pickle.dumps(cache)),
    "deepcopy": lambda cache, model, folder: copy.deepcopy(cache),
}


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 16}], ids=["greedy", "beams", "chunks"]
)
def test_lossless_tokens_are_those_of_a_dense_cache(model, options):
    ids = prompt(2, 30)
    dense = generate(model, ids, DynamicCache(config=model.config), max_new_tokens=8, **options)
    ours = generate(model, ids, kv.KVCache(config=model.config), max_new_tokens=8, **options)
    assert torch.equal(ours.sequences, dense.sequences)
    assert len(set(ours.sequences[:, 30:].flatten().tolist())) > 2


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_copies_go_on_alike(model, make, way, tmp_path):
    cache = filled(model, make)
    other = way(cache, model, tmp_path)
    assert [type(layer) for layer in other.layers] == [type(layer) for layer in cache.layers]
    assert other._n_states == cache._n_states
    assert other.nbytes <= cache.nbytes and other.nbytes_dense == cache.nbytes_dense
    assert_same(other, cache)
    shared = {t.data_ptr() for t in states(cache).values()} & {t.data_ptr() for t in states(other).values()}
    assert not shared
    assert torch.equal(go_on(model, other), go_on(model, cache))
    assert_same(other, cache)
    # a new text begins with layers of the same kind
    for each in (cache, other):
        each.reset()
        replay(model, each, prompt(1, 20, seed=4), [20])
    assert_same(other, cache)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_copies_of_an_empty_cache(model, way, tmp_path):
    other = way(kv.QuantCache(8, window=8, config=model.config), model, tmp_path)
    replay(model, other, prompt(2, N), [N])
    assert_same(other, filled(model, CACHES["quant8"]))


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_rows_of_the_batch(model, make):
    cache = filled(model, make, batch=3)
    cache.batch_select_indices([2, 0])
    alone = make(config=model.config)
    replay(model, alone, prompt(3, N)[[2, 0]], [N])
    assert cache.batch_size == alone.batch_size == 2
    assert_close("logits", go_on(model, cache), go_on(model, alone), 1e-4)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    assert {t.shape[0] for t in states(cache).values()} == {4}
    alone.reorder_cache(torch.tensor([0, 0, 1, 1]))
    assert_close("logits", go_on(model, cache, 4), go_on(model, alone, 4), 1e-4)


def test_rows_of_the_batch_of_one_layer(falcon):
    layer = filled(falcon, CACHES["quant8"]).layers[0]
    before = layer.conv_states[0].clone(), layer.recurrent_states[0].clone()
    with pytest.raises(IndexError, match="row 5 of a batch of 2"):
        layer.batch_select_indices([0, 5])
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.recurrent_states[0], before[1][[0, 0, 1, 1]])
    layer.batch_select_indices([True, False, True, False])
    assert torch.equal(layer.conv_states[0], before[0]) and layer.batch_size == 2


def test_reset_frees_and_takes_another_batch(model):
    cache = filled(model, CACHES["quant8"])
    cache.reset()
    assert cache.nbytes == cache.nbytes_dense == 0 and cache.batch_size == -1
    replay(model, cache, prompt(3, N), [N])
    assert_same(cache, filled(model, CACHES["quant8"], batch=3))


def test_bytes_and_report(model):
    cache = filled(model, CACHES["quant8"])
    dense = DynamicCache(config=model.config)
    replay(model, dense, prompt(2, N), [N])
    rows = sum(
        t.nbytes
        for layer in dense.layers
        for t in (getattr(layer, s, None) for s in ("keys", "values"))
        if t is not None
    )
    held = sum(t.nbytes for t in states(cache).values())
    assert held and cache.nbytes_dense == rows + held
    stores = [layer.store.nbytes for layer in cache.layers if isinstance(layer, kv.KVLayer)]
    assert cache.nbytes == sum(stores) + held
    report = cache.report()
    assert sum(row["nbytes"] for row in report) == cache.nbytes
    ours = [row for row, layer in zip(report, cache.layers, strict=True) if isinstance(layer, kv.KVLayer)]
    assert ours and all(row["tokens_seen"] == row["n_kept"] == N for row in ours)
    assert all(row["tokens_seen"] is None for row in report if row["class"] == "LinearAttentionLayer")


# -- taking tokens back ------------------------------------------------------------------------------------------------


def test_states_that_cannot_be_taken_back_are_not(model):
    cache = filled(model, CACHES["lossless"])
    if any(".recurrent" in name for name in states(cache)):
        cache.activate_past_recording()
        said = r"layer \d: recurrent states .* cannot be taken back"
    else:
        said = "layer 0: states of linear attention cannot be taken back unless they were recorded"
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=said):
        cache.crop(-3)
    assert_same(cache, before)
    cache.crop(0)
    assert_same(cache, before)


@pytest.mark.parametrize("make", [CACHES["lossless"], CACHES["quant8"]], ids=["lossless", "quant8"])
def test_recorded_convolutions_are_taken_back(make):
    model = new_model(CONFIGS["lfm2"]())
    cache, plain = make(config=model.config), filled(model, make)
    cache.activate_past_recording()
    replay(model, cache, torch.cat([prompt(2, N), prompt(2, 7, seed=9)], 1), [N, 7])
    assert cache.is_croppable
    cache.crop(-7)
    assert_close("logits", go_on(model, cache), go_on(model, plain), 1e-4)


def test_a_crop_that_a_later_layer_refuses_changes_no_convolution():
    model = new_model(CONFIGS["lfm2"]())
    cache = kv.KVCache(config=model.config)
    cache.activate_past_recording()
    replay(model, cache, prompt(2, N), [N])
    before = copy.deepcopy(cache)

    def refuse(self, n):
        raise RuntimeError("no")

    last = cache.layers[2]
    last.__class__ = type("Refusing", (LinearAttentionLayer,), {"crop": refuse})
    with pytest.raises(RuntimeError, match="no"):
        cache.crop(-3)
    last.__class__ = LinearAttentionLayer
    assert_same(cache, before)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_cache_without_config_says_so(model):
    cache = kv.KVCache()
    with pytest.raises(ValueError, match=r"KVCache\(\.\.\., config=model\.config\)"):
        model(prompt(1, 5), **cache_argument(cache))


def test_a_first_layer_whose_attention_comes_first():
    layers = dict(layers_block_type=["hybrid", "linear_attention", "linear_attention"])
    model = new_model(Zamba2Config(**SIZES | ZAMBA | layers))
    with pytest.raises(ValueError, match=r"config=model\.config"):
        model(prompt(1, 5), **cache_argument(kv.KVCache()))


def test_indexed_attention_says_so_too(tmp_path):
    sizes = dict(kv_lora_rank=32, q_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16)
    index = dict(num_key_value_heads=4, index_topk=16, index_head_dim=16, index_n_heads=2, first_k_dense_replace=3)
    model = new_model(DeepseekV32Config(**SIZES | sizes | index, attn_implementation="eager"), "eager")
    with pytest.raises(ValueError, match=r"config=model\.config"):
        model(prompt(1, 5), **cache_argument(kv.KVCache()))
    cache = filled(model, CACHES["lossless"])
    for way in WAYS.values():
        other = way(cache, model, tmp_path)
        assert torch.equal(go_on(model, other), go_on(model, copy.deepcopy(cache)))


def test_a_file_needs_the_model(model, tmp_path):
    filled(model, CACHES["lossless"]).save(tmp_path)
    with pytest.raises(kv.CacheFileError, match="load it with model="):
        kv.KVCache.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    {
        "no states": (lambda entry: entry.update(states=None), r"layers\[1\].states: the model has"),
        "a state that is not there": (
            lambda entry: entry["states"].update({"conv_kernel_size.3": 4}),
            r"layers\[1\].states.conv_kernel_size.3",
        ),
        "a flag of another type": (
            lambda entry: entry["states"].update({"has_previous_state.0": 1}),
            r"layers\[1\].states.has_previous_state.0",
        ),
        "a flag against a tensor": (
            lambda entry: entry["states"].update({"is_conv_states_initialized.0": False}),
            r"layers\[1\].states.is_conv_states_initialized.0",
        ),
        "a method": (lambda entry: entry["states"].update({"update": 1}), r"layers\[1\].states.update"),
    }.values(),
    ids=["none", "unknown", "type", "flag", "method"],
)
def test_damaged_states_are_refused(falcon, change, said, tmp_path):
    path = filled(falcon, CACHES["lossless"]).save(tmp_path) / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw["layers"][1])
    path.write_text(json.dumps(raw))
    with pytest.raises(kv.CacheFileError, match=said):
        kv.KVCache.load(tmp_path, model=falcon)


def test_retrofits_do_not_go_with_states(falcon):
    with pytest.raises(ValueError, match="DMC does not go with layers that have linear attention"):
        kv.DMCCache(config=falcon.config)


# -- caches all of whose layers are transformers' own ------------------------------------------------------------------


def test_rows_of_the_batch_without_a_layer_of_ours():
    model = tiny_model("mistral-window8")
    cache, dense = kv.KVCache(config=model.config), DynamicCache(config=model.config)
    for each in (cache, dense):
        replay(model, each, prompt(2, 20), [20])
        each.batch_repeat_interleave(2)
    assert not any(isinstance(layer, StatefulLayer | kv.KVLayer) for layer in cache.layers)
    assert cache.batch_size == 4
    assert torch.equal(go_on(model, cache, 4), go_on(model, dense, 4))
    with pytest.raises(IndexError, match="row 4 of a batch of 4"):
        cache.batch_select_indices([4])


def test_recording_is_refused_before_anything_changes():
    cache = kv.DMCCache()
    with pytest.raises(ValueError, match="DMC cannot take tokens back"):
        cache.activate_past_recording()
    assert not cache._records_past and cache._new_layer(0).record_past is False
