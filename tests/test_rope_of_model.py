"""Which layers rotate their keys, and how, found out from the model's own code."""

import copy
import sys
import warnings

import pytest
import torch
from cases import KNOBS, SIZES, assert_close, generate, new_model, prompt, tiny_model
from transformers import CONFIG_MAPPING, DynamicCache, LlamaConfig

import hf_kvcache as kv
from hf_kvcache import rope_of_model
from hf_kvcache.compat import cache_argument
from hf_kvcache.rope_of_model import rope_of

# kind of model: what its config is given beside the sizes, and how many channels the layers that are ours rotate
TOLERANCE = 1e-3  # some models scale queries by position; a key at a wrong place is off by 0.1 and more
MIXED = dict(num_hidden_layers=4, sliding_window=16)
SWA = dict(layer_types=["sliding_attention", "full_attention"] * 2)
MOE = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_shared_experts=1, n_group=1, topk_group=1
)
GPT = dict(
    vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=512, rotary_dim=8, bos_token_id=1, eos_token_id=2
)
KINDS = {
    "llama": ({}, [16, 16]),
    "exaone4": (MIXED | SWA, [0, 0]),
    "exaone4-full": (dict(sliding_window=None, num_hidden_layers=2, layer_types=["full_attention"] * 2), [16, 16]),
    "exaone_moe": (MIXED | SWA | MOE | dict(num_shared_experts=1, is_moe_layer=[False] * 4), [0, 0]),
    "afmoe": (MIXED | SWA | MOE | dict(num_dense_layers=4), [0, 0]),
    "cohere2": (MIXED | SWA, [0, 0]),
    "smollm3": (
        dict(num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0], use_sliding_window=False),
        [16, 0, 16, 0],
    ),
    "gpt_neox": ({}, [4, 4]),
    "phi": ({}, [8, 8]),
    "stablelm": ({}, [4, 4]),
    "granitemoehybrid": (
        dict(layer_types=["attention"] * 2, position_embedding_type="rope", num_local_experts=0),
        [16, 16],
    ),
    "granite_swa": (
        dict(num_hidden_layers=4, layer_rope_theta=[1e4, 0, 1e6, 0], layer_types=["full_attention"] * 4),
        [16, 0, 16, 0],
    ),
    "beam": (MIXED | SWA, [0, 0]),
}
# the oldest release that is supported has fewer
KINDS = {name: value for name, value in KINDS.items() if name.removesuffix("-full") in CONFIG_MAPPING}


def model_of(name, **changes):
    given, rotated = KINDS[name]
    config = CONFIG_MAPPING[name.removesuffix("-full")]
    return new_model(config(**SIZES | {"hidden_size": 64, "head_dim": 16} | given | changes)), rotated


def interleaved(kind):
    return new_model(CONFIG_MAPPING[kind](**GPT))


def attention_of(model):
    found = {m.layer_idx: m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")}
    return [found[i] for i in sorted(found)]


def prefill(model, cache, ids, shift=0):
    positions = torch.arange(ids.shape[1])[None] + shift
    return model(ids, position_ids=positions, **cache_argument(cache))


@pytest.mark.parametrize("name", KINDS)
def test_compact_moves_keys_where_the_model_would_have_put_them(name):
    model, rotated = model_of(name)
    ids = prompt(1, 40)
    cache = kv.EvictionCache("streaming", budget=24, rerotate_keys=True, **KNOBS)
    prefill(model, cache, ids)
    ours = [layer for layer in cache.layers if isinstance(layer, kv.KVLayer)]
    assert [0 if layer.rope is None else 2 * layer.rope.inv_freq.shape[0] for layer in ours] == rotated
    # rotary attention does not change when all positions move, so neither do the keys of later layers but by rotation
    dense = DynamicCache(config=model.config)
    prefill(model, dense, ids, shift=16)
    for layer in ours:
        expected = dense.layers[layer.layer_idx].keys[:, :, : KNOBS["n_sink"]]
        assert_close(f"layer {layer.layer_idx}", layer.store.dense["k"][:, :, : KNOBS["n_sink"]], expected, TOLERANCE)


@pytest.mark.parametrize("name", KINDS)
def test_low_rank_at_full_rank_is_the_model(name):
    model, rotated = model_of(name)
    cache = kv.LowRankCache(1.0, window=8)
    ours = generate(model, prompt(1, 80), cache, max_new_tokens=6)
    layers = [layer for layer in cache.layers if isinstance(layer, kv.KVLayer)]
    assert [layer.store.keys.format for layer in layers] == ["lowrank/rope" if n else "lowrank" for n in rotated]
    reference = generate(model, prompt(1, 80), DynamicCache(config=model.config), max_new_tokens=6)
    assert_close("logits", torch.stack(ours.logits), torch.stack(reference.logits), 2e-2)


@pytest.mark.parametrize("kind", ["gptj", "codegen"])
def test_an_interleaved_rope_is_refused_with_what_works(kind):
    model, ids = interleaved(kind), prompt(1, 60)
    # older releases have an attention of their own there, which no low-rank cache can serve
    calls_registry = hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")
    own = "between cache and attention|reads keys and values itself"
    for refused in (
        kv.LowRankCache(window=8),
        kv.EvictionCache("expected_attention", budget=24, **KNOBS),
        kv.EvictionCache("streaming", budget=24, rerotate_keys=True, **KNOBS),
    ):
        with pytest.raises(ValueError, match=r'LowRank\(rope="post"\) does without' if calls_registry else own):
            generate(model, ids, refused)
    if not calls_registry:
        return
    ours = generate(model, ids, kv.LowRankCache(1.0, rope="post", window=8))
    assert torch.equal(ours.sequences, generate(model, ids, DynamicCache()).sequences)


def test_hooks_and_weights_of_the_module_are_not_involved():
    model = copy.deepcopy(tiny_model())
    module, calls = model.model.layers[1].self_attn, []
    before = [dict(vars(m)) for m in module.modules()]
    for m in module.modules():
        m.register_forward_hook(lambda *_: calls.append(1))
        m.register_forward_pre_hook(lambda *_: calls.append(1))
    # as accelerate wraps modules whose weights are elsewhere
    module.forward = module.q_proj.forward = lambda *args, **kwargs: calls.append(1)
    model.model.layers[1].self_attn.k_proj.to("meta")
    assert rope_of(module, 16).inv_freq.shape == (8,)
    assert not calls
    assert [m.training for m in module.modules()] == [state["training"] for state in before]


def test_the_models_own_angles_are_used():
    """Bringing a model to bfloat16 rounds the angles of its embedding, and it rotates by those."""
    model = new_model(LlamaConfig(**SIZES)).to(torch.bfloat16)
    cache = kv.LowRankCache(window=8)
    prefill(model, cache, prompt(1, 40))
    own = model.model.rotary_emb.inv_freq
    assert own.dtype == torch.bfloat16
    assert torch.equal(cache.layers[0].rope.inv_freq, own.double())
    assert torch.equal(rope_of(attention_of(model)[0], 16, model).inv_freq, own.double())


def test_layers_that_rotate_alike_share_their_tables():
    cache = kv.LowRankCache(window=8)
    prefill(tiny_model(), cache, prompt(1, 40))
    assert cache.layers[0].rope is cache.layers[1].rope


class Unasked(torch.nn.Module):
    """An attention module whose forward pass nobody knows how to call."""

    def __init__(self, config, **attributes):
        super().__init__()
        self.config, self.layer_idx = config, 1
        vars(self).update(attributes)

    def forward(self, riddle, *, answer):
        raise NotImplementedError


def test_what_cannot_be_run_goes_by_names():
    config = LlamaConfig(**SIZES)
    assert rope_of(Unasked(config, use_rope=False), 16) is None
    with pytest.raises(ValueError, match="no rotary embedding"):
        rope_of(Unasked(config, use_rope=True), 16)
    config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="cannot be found out which"):
        rope_of(Unasked(config), 16)


def test_a_module_that_cannot_be_run_is_asked_by_its_function(monkeypatch):
    module = attention_of(tiny_model())[0]
    known = rope_of(module, 16)
    monkeypatch.setattr(rope_of_model, "_rows", lambda *_: None)
    assert rope_of(module, 16).kind == known.kind


def test_tokens_that_share_a_position_say_nothing_about_angles():
    # one real token in front of padding on the right, which stands where it does
    mask = torch.tensor([[1, 0, 0, 0, 0]])
    cache = kv.LowRankCache(0.5, window=256)
    ours = generate(tiny_model(), prompt(1, 5), cache, attention_mask=mask, max_new_tokens=3)
    dense = generate(tiny_model(), prompt(1, 5), attention_mask=mask, max_new_tokens=3)
    assert torch.equal(ours.sequences, dense.sequences)


def test_another_rotation_than_the_configs_is_refused():
    model = new_model(LlamaConfig(**SIZES))
    model.model.rotary_emb.forward = lambda x, position_ids: tuple(
        f(position_ids[..., None] * torch.linspace(1, 2, 16)) for f in (torch.cos, torch.sin)
    )
    with pytest.raises(ValueError, match="other angles"):
        prefill(model, kv.LowRankCache(window=8), prompt(1, 40))


def longropes_said(model):
    """Warnings about longrope while a new cache meets the model."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        prefill(model, kv.KVCache(), prompt(1, 20))
    return [str(w.message) for w in seen if "longrope" in str(w.message)]


@pytest.mark.parametrize("kind", ["phi3", "phimoe"])
def test_models_that_drop_the_cache_are_warned_of_once(kind, unsaid):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "short_mscale": 1.0, "long_mscale": 1.0}
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"} | {"hidden_size": 64}
    config = CONFIG_MAPPING[kind](**sizes | {"max_position_embeddings": 256}, rope_parameters=rope)
    config.original_max_position_embeddings = 64
    model = new_model(config)
    (said,) = longropes_said(model)
    assert "after 64 tokens" in said and "drops the cache" in said
    assert not longropes_said(model)


@pytest.mark.parametrize("arch", ["phi3", "llama"])
def test_models_whose_text_stays_in_the_cache_are_not_warned_of(arch, unsaid):
    assert not longropes_said(tiny_model(arch))
