"""Attention sinks (gpt-oss): one more term in the sum of every softmax, in every way that attention is computed."""

import pytest
import torch
from cases import BY_ID, KNOBS, NAMED, assert_close, new_model, padded, prompt, replay
from transformers import DynamicCache, GptOssConfig

import hf_kvcache as kv
from hf_kvcache.attention.blockwise import attend_dense
from hf_kvcache.compat import cache_argument

SIZES = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention"],
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)


def model_with_sinks(implementation, value=1.5):
    model = new_model(GptOssConfig(**SIZES), implementation)
    for layer in model.model.layers:
        layer.self_attn.sinks.copy_(torch.tensor([value, value, -value, value / 2]))
    return model


@pytest.fixture(scope="module")
def models():
    return {name: model_with_sinks(name) for name in (NAMED, "eager")}


@pytest.mark.parametrize("implementation", [NAMED, "eager"])
@pytest.mark.parametrize("make", [lambda: None, lambda: DynamicCache(config=GptOssConfig(**SIZES)), kv.KVCache])
@torch.no_grad()
def test_lossless(models, implementation, make):
    ids, mask, _ = padded([70, 41])
    real, cache = mask.bool(), make()
    sizes = [70] if cache is None else [40, 3, 1, 1, 25]
    ours = replay(models[implementation], cache, ids, sizes, mask) if cache is not None else None
    if cache is None:
        ours = models[implementation](ids, attention_mask=mask, use_cache=False).logits
        theirs = models["eager"](ids, attention_mask=mask, use_cache=False).logits
    else:
        theirs = replay(models["eager"], DynamicCache(config=models["eager"].config), ids, sizes, mask)
    assert_close("logits", ours[real], theirs[real], 1e-5)


@torch.no_grad()
def test_they_matter(models):
    with_sinks = models[NAMED](prompt(1, 40)).logits
    without = model_with_sinks(NAMED, -1e4)(prompt(1, 40)).logits
    assert (with_sinks - without).abs().max() > 0.1


COMPRESSED = [
    "quant8-window8",
    "quant4-window0-sink4",
    "sparse0.5-window8",
    "sparse0.5-quant8-window8",
    "keydiff-budget24",
    "snapkv-budget24",
    "adakv-budget42",
    "adakv-quant8",
    "keydiff-quant8",
]


@pytest.mark.parametrize("case", COMPRESSED)
@torch.no_grad()
def test_fused_equals_the_models_own(models, case):
    """The same rows, read by ops and a sink, and expanded for the model's own attention."""
    ids = prompt(2, 90)
    for sizes in ([1, 1, 1], [3]):
        logits = []
        for name in (NAMED, "eager"):
            # one model makes the rows that are encoded: the last bit of one may decide what it is rounded to
            replay(models["eager"], cache := BY_ID[case].make(), ids[:, :60], [60])
            cache.rebind()
            logits.append(replay(models[name], cache, ids[:, 60:63], sizes))
        assert_close("logits", *logits, 1e-5)
    cache = BY_ID[case].make()
    replay(models[NAMED], cache, ids, [80] + [1] * 10)
    assert cache.layers[1].store.n_kept < 90 or cache.layers[1].store.n_packed


@torch.no_grad()
def test_low_rank(models):
    ids = prompt(1, 80)
    runs = [
        replay(models[n], kv.LowRankCache(0.5, window=8, rope="post"), ids, [70] + [1] * 10) for n in (NAMED, "eager")
    ]
    assert_close("logits", *runs, 1e-4)


def test_gradients_go_through_the_models_own_attention(models):
    for implementation in (NAMED, "eager"):
        model = model_with_sinks(implementation)
        model.requires_grad_(True)
        model(prompt(1, 20), labels=prompt(1, 20), use_cache=False).loss.backward()
        grad = model.model.layers[1].self_attn.sinks.grad
        assert grad is not None and grad.abs().max() > 0


@pytest.mark.parametrize("shape", [(1, 1), (63, 63), (300, 300), (7, 300), (300, 1500)], ids=str)
@pytest.mark.parametrize("is_masked", [False, True], ids=["causal", "masked"])
def test_attention_in_blocks(shape, is_masked):
    S, N = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, S, 16, generator=generator)
    k, v = torch.randn(2, 2, N, 16, generator=generator), torch.randn(2, 2, N, 8, generator=generator)
    causal = torch.ones(S, N, dtype=torch.bool).tril(N - S)
    mask = causal[None, None].expand(2, 1, -1, -1).clone()
    if is_masked:
        mask[0, :, :, : N // 3] = False
    out, lse = attend_dense(q, k, v, scaling=0.3, mask=mask if is_masked else None)
    k, v = (x.repeat_interleave(2, 1).double() for x in (k, v))
    scores = (q.double() @ k.mT * 0.3).masked_fill(~mask, float("-inf"))
    assert_close("lse", lse.nan_to_num(neginf=-1e4), scores.logsumexp(-1).nan_to_num(neginf=-1e4), 1e-5)
    assert_close("out", out, scores.softmax(-1).nan_to_num(0.0) @ v, 1e-5)


@torch.no_grad()
def test_evicting_in_place_of_a_prompt_that_goes_on(models):
    cache = kv.EvictionCache("keydiff", budget=24, **KNOBS)
    replay(models[NAMED], cache, prompt(2, 100), [60, 40])
    assert models[NAMED](prompt(2, 1), **cache_argument(cache)).logits.isfinite().all()
