"""Models that compute with keys and values between cache and attention find tensors; rows are compressed as ever."""

import pytest
import torch
from cases import KNOBS, NAMED, assert_close, generate, new_model, padded, prompt
from transformers import BloomConfig, DeepseekV3Config, DynamicCache, JetMoeConfig

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument

MLA = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    kv_lora_rank=32,
    q_lora_rank=None,
    qk_rope_head_dim=16,
    qk_nope_head_dim=16,
    v_head_dim=16,
    first_k_dense_replace=1,
    pad_token_id=0,
)
CONFIGS = {
    "deepseek": lambda: DeepseekV3Config(**MLA),
    "bloom": lambda: BloomConfig(vocab_size=128, hidden_size=64, n_head=4, n_layer=2, pad_token_id=0),
    "jetmoe": lambda: JetMoeConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=16,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
    ),
}


@pytest.fixture(scope="module")
def models():
    models = {}
    for name, make in CONFIGS.items():
        for implementation in (NAMED, "eager"):
            models[name, implementation] = new_model(make(), implementation)
            models[name, implementation].generation_config.eos_token_id = None
    return models


@pytest.mark.parametrize("implementation", [NAMED, "eager"])
@pytest.mark.parametrize("arch", CONFIGS)
def test_lossless(models, arch, implementation):
    ids, mask, _ = padded([80, 55])
    ours = generate(models[arch, implementation], ids, kv.KVCache(), attention_mask=mask)
    theirs = generate(models[arch, "eager"], ids, DynamicCache(config=CONFIGS[arch]()), attention_mask=mask)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_close("logits", torch.stack(ours.logits), torch.stack(theirs.logits), 1e-5)


@pytest.mark.parametrize("implementation", [NAMED, "eager"])
@pytest.mark.parametrize("arch", CONFIGS)
def test_eight_bits_are_held_and_nothing_else(models, arch, implementation):
    model, cache = models[arch, implementation], kv.QuantCache(8, window=8)
    out = generate(model, prompt(2, 200), cache, max_new_tokens=8)
    reference = generate(model, prompt(2, 200), kv.KVCache(), max_new_tokens=8)
    assert_close("logits", torch.stack(out.logits), torch.stack(reference.logits), 0.05)
    # float32 rows in 8 bits; what was expanded for a call is gone
    assert cache.nbytes < 0.6 * cache.nbytes_dense
    assert all(layer.store.n_packed >= 160 for layer in cache.layers)


def explicit(model, ids, hidden):
    """Logits of the last token where the attention of every layer does not see what is hidden, `[layers][T]`."""
    hooks = []
    for layer, is_hidden in zip(model.model.layers, hidden):

        def hide(module, args, kwargs, is_hidden=is_hidden):
            n = kwargs["hidden_states"].shape[1]
            mask = torch.ones(n, n, dtype=torch.bool).tril()
            mask[-1] &= ~is_hidden
            additive = torch.zeros(1, 1, n, n).masked_fill(~mask, torch.finfo(torch.float32).min)
            return args, kwargs | {"attention_mask": additive}

        hooks.append(layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True))
    try:
        return model(ids, use_cache=False).logits[:, -1]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("implementation", [NAMED, "eager"])
@pytest.mark.parametrize("policy", ["keydiff", "streaming", "l2norm"])
def test_latents_are_evicted(models, policy, implementation):
    """What is left of a latent cache is attended to as dense attention would under a mask."""
    model, ids = models["deepseek", implementation], prompt(1, 81)
    cache = kv.EvictionCache(policy, budget=30, **KNOBS)
    model(ids[:, :80], **cache_argument(cache))
    hidden = []
    for layer in cache.layers:
        kept = layer.store.positions[0, 0].long()
        is_hidden = torch.ones(81, dtype=torch.bool)
        is_hidden[kept], is_hidden[80] = False, False
        hidden.append(is_hidden)
    assert all(int((~is_hidden).sum()) == 31 for is_hidden in hidden)
    ours = model(ids[:, 80:], **cache_argument(cache)).logits[:, -1]
    assert_close("logits", ours, explicit(models["deepseek", "eager"], ids, hidden), 1e-5)


REFUSED = {
    "bloom": {"keydiff": "instead of calling a function of transformers' registry, so KeyDiff"},
    "deepseek": {
        "snapkv": "SnapKV scores rows by queries, which do not fit latents",
        "h2o": "H2O scores rows by queries",
        "expected_attention": "ExpectedAttention takes something|scores rows by queries",
    },
    "jetmoe": {"keydiff": "makes 4 heads of 2 before attention"},
}


@pytest.mark.parametrize("arch, policy", [(arch, policy) for arch, kinds in REFUSED.items() for policy in kinds])
def test_what_cannot_be_is_refused_in_the_first_call(models, arch, policy):
    cache = kv.EvictionCache(policy, budget=48)
    with pytest.raises(ValueError, match=REFUSED[arch][policy]):
        models[arch, NAMED](prompt(1, 60), **cache_argument(cache))


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: kv.LowRankCache(0.5, window=8), "takes RoPE off keys; use LowRank.rope=.post"),
        (lambda: kv.EvictionCache("streaming", budget=48, rerotate_keys=True), "rerotate_keys=True rotates keys"),
        (lambda: kv.SparseCache(0.5, rule="output_aware"), "goes by queries"),
        (lambda: kv.LocretCache(budget=48, local=8), "carries no retaining heads"),
        (lambda: kv.EvictionCache("keydiff", budget=48, merge=True), "merges rows"),
    ],
    ids=["pre-rope", "rerotated", "queries", "locret", "merge"],
)
def test_what_latents_do_not_go_with(models, make, match):
    with pytest.raises(ValueError, match=match):
        models["deepseek", NAMED](prompt(1, 60), **cache_argument(make()))


def test_a_view_is_a_tensor_to_whoever_computes_with_it():
    cache = kv.KVCache()
    k, v = torch.randn(2, 1, 2, 5, 8).unbind(0)
    keys, values = cache.update(k, v, 0)
    assert keys.shape == values.shape == (1, 2, 5, 8) and keys.dtype is torch.float32 and len(keys) == 1
    assert keys.contiguous() is keys and keys.to(torch.float32) is keys and cache.handed is None
    assert torch.equal(torch.cat([keys, keys], 2), torch.cat([k, k], 2)) and cache.handed is not None
    assert torch.equal(keys.transpose(1, 2), k.transpose(1, 2)) and torch.equal(values[..., :4], v[..., :4])
    assert torch.equal(keys @ values.mT, k @ v.mT) and torch.equal(
        torch.nn.functional.linear(values, v[0, 0]), v @ v[0, 0].mT
    )
    assert torch.equal(2 * keys, 2 * k) and torch.equal(k + values, k + v)
    with pytest.raises(AttributeError, match="a KVView has no 'colour', and neither have tensors"):
        _ = keys.colour
