"""The attention function, its pass-throughs, and what other implementations get."""

import inspect
import subprocess
import sys
import textwrap
import types
import warnings

import pytest
import torch
from cases import (
    ARCHITECTURES,
    BY_ID,
    CASES,
    KNOBS,
    NAMED,
    assert_close,
    generate,
    new_model,
    padded,
    prompt,
    replay,
    tiny_model,
)
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument

SEEN = []


def toy(module, query, key, value, mask, **kwargs):
    """Somebody's attention function: it wants tensors and says what it got."""
    SEEN.append((type(key), tuple(key.shape)))
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register("toy", toy)


@pytest.mark.parametrize("case", ["dense", "quant8-window8", "quant4-window0-sink4"])
def test_other_implementations_get_tensors(case):
    SEEN.clear()
    cache = BY_ID[case].make()
    logits = replay(tiny_model("llama", "toy"), cache, prompt(2, 70), [60] + [1] * 10)
    assert {kind for kind, _ in SEEN} == {torch.Tensor}
    assert SEEN[-1][1] == (2, 2, 70, 16)
    expected = replay(tiny_model(), BY_ID[case].make(), prompt(2, 70), [60] + [1] * 10)
    assert_close("logits", logits, expected, 1e-4)
    # dense for the call, not for good
    assert cache.nbytes < cache.nbytes_dense or case == "dense"


def test_other_implementations_over_evicted_rows():
    cache = kv.EvictionCache("streaming", budget=24, **KNOBS)
    model = tiny_model("llama", "toy")
    logits = replay(model, cache, prompt(1, 70), [60] + [1] * 10)
    expected = replay(tiny_model(), kv.EvictionCache("streaming", budget=24, **KNOBS), prompt(1, 70), [60] + [1] * 10)
    assert_close("logits", logits, expected, 1e-5)
    with pytest.raises(ValueError, match='has evicted rows.*attn_implementation="hf_kvcache"'):
        replay(model, cache, prompt(1, 3), [3])


def test_flex_attention_gets_tensors():
    # uncompiled, which is slow per token but starts at once
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_model("llama", "flex_attention")
        expected = model(prompt(2, 40), use_cache=False).logits
        for case in ("dense", "quant4-window256"):
            assert_close("logits", replay(model, BY_ID[case].make(), prompt(2, 40), [30, 1, 1, 8]), expected, 1e-4)
        # block masks hide the padding from a policy
        with pytest.raises(ValueError, match='BlockMask does not say.*attn_implementation="hf_kvcache"'):
            replay(model, BY_ID["keydiff-budget24"].make(), prompt(2, 40), [40])


def test_a_function_registered_after_the_cache_gets_tensors():
    caches = kv.KVCache(), kv.QuantCache(8, window=8), kv.EvictionCache("keydiff", budget=24, **KNOBS)
    AttentionInterface.register(
        "late", lambda module, q, k, v, mask, **kwargs: toy(module, q, k[:], v[:], mask, **kwargs)
    )
    model, ids = new_model(ARCHITECTURES["llama"](), "late"), prompt(1, 60)
    with pytest.raises(ValueError, match="instead of calling a function of transformers' registry, so KeyDiff"):
        model(ids, **cache_argument(caches[-1]))
    for cache, case in zip(caches[:2], ("dense", "quant8-window8")):
        logits = replay(model, cache, ids, [50] + [1] * 10)
        assert_close("logits", logits, replay(tiny_model(), BY_ID[case].make(), ids, [50] + [1] * 10), 1e-4)
        # nobody says when it has read them, so rows are packed before the next ones come
        assert cache.layers[0].store.n_packed == (32 if "quant" in case else 0)


def test_pass_throughs_leave_tensors_alone():
    # with a KVCache constructed, stock caches under stock implementations do what they did
    kv.KVCache()
    ids, mask, _ = padded([40, 20])
    for implementation in ("sdpa", "eager"):
        model = tiny_model("llama", implementation)
        runs = [generate(model, ids, cache, attention_mask=mask) for cache in (DynamicCache(), None)]
        assert torch.equal(runs[0].sequences, runs[1].sequences)
    once = AttentionInterface()["sdpa"]
    kv.KVCache()
    assert AttentionInterface()["sdpa"] is once, "a pass-through wraps once"
    # a model's repository that was loaded before wraps it, too
    assert inspect.unwrap(once) is sdpa_attention_forward


def test_eager_still_returns_weights_of_tensors_and_views():
    model = tiny_model("llama", "eager")
    for cache in (kv.KVCache(), DynamicCache()):
        out = model(prompt(1, 10), **cache_argument(cache), output_attentions=True)
        assert out.attentions[0].shape == (1, 4, 10, 10)
        out = model(prompt(1, 1), **cache_argument(cache), output_attentions=True)
        assert cache.get_seq_length() == 11


@pytest.mark.parametrize("case", [case for case in CASES if case.id in ("dense", "quant4-window8", "keydiff-budget24")])
def test_outside_a_model(case):
    # `KVLayer` and `kv_attention` are usable without a cache: no model is bound, the maths is the same
    from hf_kvcache.attention.interface import kv_attention

    module = types.SimpleNamespace(layer_idx=0, num_key_value_groups=2, training=False, is_causal=True)
    layer, generator = case.make()._new_layer(0), torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 2, 40, 16, generator=generator).unbind(0)
    q = torch.randn(1, 4, 40, 16, generator=generator)
    out, weights = kv_attention(module, q, *layer.update(k, v), None, scaling=0.25)
    assert weights is None
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    assert_close("output", out, expected.transpose(1, 2), 1e-6)
    assert layer.store.n_packed == (32 if "quant" in case.id else 0)


def test_import_is_quiet_and_changes_only_our_key():
    program = """
        import sys
        sys.modules["triton"] = None
        from transformers import AttentionInterface, AttentionMaskInterface
        def snapshot():
            return [{k: r[k] for k in r.valid_keys()} for r in (AttentionInterface(), AttentionMaskInterface())]
        before = snapshot()
        import warnings; warnings.simplefilter("error")
        import hf_kvcache
        for old, new in zip(before, snapshot()):
            assert new.pop("hf_kvcache")
            assert old == new, (old, new)
        for name in ("triton", "matplotlib"):
            assert sys.modules.get(name) is None, name
        import torch
        assert not torch.cuda.is_initialized()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("implementation", [NAMED, "sdpa", "eager"])
@pytest.mark.parametrize("case", ["dense", "quant4-window8", "keydiff-budget24"])
def test_gradients(case, implementation):
    # training through a prompt works, and so does a forward pass with gradients on a filled cache
    model = new_model(ARCHITECTURES["llama"](), implementation)
    model.requires_grad_(True)
    cache, ids = BY_ID[case].make(), prompt(2)
    model(ids, **cache_argument(cache), labels=ids).loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(ids, use_cache=False, labels=ids).loss.backward()
    for ours, theirs in zip(grads, (p.grad for p in model.parameters())):
        assert_close("gradient", ours, theirs, 1e-5)
    for n in (1, 3, 1):
        assert model(prompt(2, n), **cache_argument(cache)).logits.isfinite().all()
