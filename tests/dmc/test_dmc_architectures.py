"""Models of many kinds, retrofitted: at once, in pieces, and with transformers' own attention functions."""

from dataclasses import replace

import pytest
import torch
from cases import ARCHITECTURES, SIZES, new_model, stock_implementation
from tiny_retrofits import CACHES, batch, feed, lengths, settings, whole
from transformers import CohereConfig, Glm4MoeConfig, Olmo2Config, SmolLM3Config

from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.dmc import retrofit, retrofits, zero_rows
from hf_kvcache.dmc.merging import merge

MORE = {
    # every second layer without RoPE
    "smollm3": lambda: SmolLM3Config(**SIZES, no_rope_layers=[1, 0]),
    # norms over all heads together
    "olmo2": lambda: Olmo2Config(**SIZES | {"num_key_value_heads": 4}),
    "cohere": lambda: CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"} | {"hidden_size": 64}),
}
KINDS = {name: make for name, make in (ARCHITECTURES | MORE).items() if name != "mistral-window8"}
HYBRIDS = ["gemma2", "gemma3"]
# eager attention of Gemma-2 computes a softmax in float32, whose masks in float64 are infinite
DTYPES, TOLERANCES = {"gemma2": torch.float32}, {"gemma2": 2e-5}
NORMED = ["qwen3", "gemma3", "olmo2"]


def new(kind, method="dmc", implementation="hf_kvcache", **knobs):
    model = new_model((KINDS | OTHERS)[kind](), implementation, DTYPES.get(kind, torch.float64))
    retrofit(model, settings(method, window=3, **knobs))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for child in retrofits(model).values():
            for rows in (child.decision, child.importance):
                if rows is not None:
                    # inputs of OLMo-2 are not normalised
                    rows.copy_(torch.randn(rows.shape, generator=generator) * (9 if kind == "olmo2" else 0.2))
    return model.requires_grad_(False)


# values are there before keys are normalised
OTHERS = {
    "glm4_moe": lambda: Glm4MoeConfig(
        **SIZES, use_qk_norm=True, first_k_dense_replace=2, n_routed_experts=2, num_experts_per_tok=1, n_group=1
    ),
}


def rows_of(cache):
    return [layer.store.packed.lengths for layer in cache.layers if hasattr(layer, "store")]


@torch.no_grad()
@pytest.mark.parametrize("method, decision", [("dmc", "borrowed"), ("dms", "borrowed"), ("dmc", "linear")])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form(kind, method, decision):
    if (kind, method, decision) == ("gemma3", "dmc", "borrowed"):
        decision = "rows"  # see `test_values_before_decisions`
    model = new(kind, method, decision=decision)
    inputs = batch([16, 9])
    is_real = inputs[1].bool()
    logits, tolerance = whole(model, *inputs), TOLERANCES.get(kind, 1e-9)
    kept = []
    for sizes in ([16], [1] * 16, [5, 1, 1, 7, 2]):
        cache = CACHES[method]()
        assert (feed(model, cache, *inputs, sizes) - logits)[is_real].abs().max() <= tolerance, sizes
        kept.append(rows_of(cache))
    # layers with a window of their own keep transformers' classes
    assert len(kept[0]) == len(retrofits(model)) == (2 if kind in HYBRIDS else model.config.num_hidden_layers)
    n = torch.tensor([[16], [9]])
    for one, other, third in zip(*kept):
        assert torch.equal(one, other) and torch.equal(one, third)
        assert (one < n).any() and one.max() > 3
    if stock_implementation(kind) == "eager" or kind in ("llama", "gemma3"):
        other = new(kind, method, stock_implementation(kind), decision=decision)
        assert (whole(other, *inputs) - logits)[is_real].abs().max() <= tolerance
        ours = feed(other, CACHES[method](), *inputs, [9, 1, 6])
        assert (ours - logits)[is_real].abs().max() <= tolerance


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen3", "phi3", "gemma2", "smollm3"])
def test_relaxed_form(kind):
    model = new(kind, tau=1e-8)
    inputs = batch([16, 9])
    hard = whole(model, *inputs)
    assert (whole(model.train(), *inputs) - hard)[inputs[1].bool()].abs().max() <= TOLERANCES.get(kind, 1e-9)
    assert all(child.call.is_relaxed for child in retrofits(model).values())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["glm4_moe", "gemma3"])
def test_values_before_decisions(kind):
    inputs = batch([12])
    with pytest.raises(RuntimeError, match='values before keys are normalised.*decision="linear"'):
        whole(new(kind), *inputs)
    # DMS leaves values alone
    for method, decision in (("dmc", "linear"), ("dmc", "rows"), ("dms", "linear"), ("dms", "borrowed")):
        model = new(kind, method, decision=decision)
        for window in (3, 0):
            for child in retrofits(model).values():
                child.settings = replace(child.settings, window=window)
            ours = feed(model, CACHES[method](), *inputs, [5, 1, 1, 5])
            assert (ours - whole(model, *inputs)).abs().max() <= 1e-9


def test_nothing_to_retrofit():
    model = new_model(ARCHITECTURES["mistral-window8"]())
    with pytest.raises(AdapterError, match="no full-attention"):
        retrofit(model, settings())


@pytest.mark.parametrize("kind", [*NORMED, "phi3"])
def test_rows_that_cannot_be_told_apart(kind):
    with pytest.raises(AdapterError, match='decision="linear"'):
        zero_rows(new(kind))


@torch.no_grad()
def test_biases_are_zeroed_too():
    # Qwen2 adds one to keys, which would decide alone
    model = new("qwen2")
    model.model.layers[0].self_attn.k_proj.bias.fill_(3.0)
    inputs, cache = batch([12]), CACHES["dmc"]()
    feed(model, cache, *inputs, [12])
    assert (lengths(cache)[0] == 1).all()
    zero_rows(model)
    cache.reset()
    feed(model, cache, *inputs, [12])
    assert (lengths(cache) == 12).all()


@torch.no_grad()
def test_values_of_a_fused_projection_are_merged():
    model = new("phi3")
    attention = model.model.layers[0].self_attn
    n_kv = 2 * attention.head_dim
    seen = {}
    # hooks run in order: what the projection gave, then what ours has made of it
    attention.qkv_proj.register_forward_hook(lambda m, i, o: seen.update(before=o), prepend=True)
    attention.qkv_proj.register_forward_hook(lambda m, i, o: seen.update(after=o))
    model(batch([16])[0], use_cache=False)
    call = retrofits(model)[0].call
    values = seen["before"][..., -n_kv:].unflatten(-1, (2, -1)).transpose(1, 2)
    means = merge(values, call.omega, call.alpha, call.settings.window).transpose(1, 2).flatten(2)
    assert call.alpha.any()
    torch.testing.assert_close(seen["after"][..., -n_kv:], means, rtol=0, atol=1e-12)
    assert (means - seen["before"][..., -n_kv:]).abs().max() > 0.01
