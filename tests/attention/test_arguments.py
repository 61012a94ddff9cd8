"""Arguments of attention: acted on, handed on to somebody who does, or refused; never dropped."""

import types

import pytest
import torch
from cases import ARCHITECTURES, BY_ID, NAMED, assert_close, new_model, prompt, tiny_model

import hf_kvcache as kv
from hf_kvcache.attention import interface
from hf_kvcache.compat import cache_argument, eager_attention


def call(model, function=None, n=1, cache=None, **arguments):
    """One call of attention as layer 0 of a model would make it."""
    module, generator = model.model.layers[0].self_attn, torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, n, 16, generator=generator)
    k, v = torch.randn(2, 1, 2, 60, 16, generator=generator).unbind(0)
    function = function or interface.kv_attention
    if cache is None:
        return function(module, q, k, v, None, scaling=0.25, **arguments)
    return function(module, q, *cache.update(k, v, 0), None, scaling=0.25, **arguments)


def test_what_nobody_acts_on_is_refused():
    model = tiny_model()
    with pytest.raises(NotImplementedError, match="LlamaAttention calls attention with indices, which neither"):
        call(model, indices=torch.zeros(1, 1, 4))
    for cache in (kv.KVCache(), kv.QuantCache(4, window=8)):
        with pytest.raises(NotImplementedError, match="indices"):
            call(model, cache=cache, n=60, indices=torch.zeros(1, 1, 4))


@pytest.mark.parametrize(
    "arguments", [dict(indices=None), dict(flag=False), dict(num_items_in_batch=torch.tensor(3)), {}]
)
def test_what_asks_for_nothing_changes_nothing(arguments):
    out, weights = call(tiny_model(), **arguments)
    assert weights is None and torch.equal(out, call(tiny_model())[0])


def test_weights_are_the_models_own():
    model, ids = tiny_model(), prompt(1, 40)
    for cache in (kv.KVCache(), kv.QuantCache(8, window=8)):
        first = model(ids, **cache_argument(cache), output_attentions=True)
        assert first.attentions[0].shape == (1, 4, 40, 40)
        step = model(ids[:, :1], **cache_argument(cache), output_attentions=True)
        assert step.attentions[0].shape == (1, 4, 1, 41) and abs(step.attentions[0].sum() - 4) < 1e-4


@pytest.mark.parametrize("implementation", [NAMED, "eager"])
def test_weights_over_evicted_rows(implementation):
    model, cache = tiny_model("llama", implementation), BY_ID["keydiff-budget24"].make()
    model(prompt(1, 60), **cache_argument(cache), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions can no longer be about all tokens; use a cache that keeps"):
        model(prompt(1, 1), **cache_argument(cache), output_attentions=True)


def test_an_argument_of_the_models_own_function_reaches_it():
    """What the eager attention beside a class names is its own to act on."""
    seen = {}
    module = new_model(ARCHITECTURES["llama"]()).model.layers[0].self_attn

    class Attention(type(module)):
        pass

    here = types.ModuleType("attention_of_a_test")

    def eager_attention_forward(module, query, key, value, attention_mask, scaling, tilt=None, **kwargs):
        seen["tilt"] = tilt
        return torch.zeros_like(query).transpose(1, 2), None

    here.eager_attention_forward = eager_attention_forward
    import sys

    sys.modules[here.__name__], Attention.__module__ = here, here.__name__
    try:
        module.__class__ = Attention
        assert eager_attention(module) is eager_attention_forward
        q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
        interface.kv_attention(module, q, k, k, None, scaling=1.0, tilt=torch.ones(1))
        assert seen["tilt"] is not None
    finally:
        del sys.modules[here.__name__]


def test_not_causal():
    """A call that says so sees later tokens, too."""
    out, _ = call(tiny_model(), n=60, is_causal=False)
    causal, _ = call(tiny_model(), n=60)
    assert (out[:, 0] - causal[:, 0]).abs().max() > 1e-2
    assert_close("last", out[:, -1], causal[:, -1], 1e-6)
    ours, _ = call(tiny_model(), n=60, cache=kv.KVCache(), is_causal=False)
    assert_close("prompt", ours, out, 1e-6)
