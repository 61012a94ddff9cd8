"""What calibration sees: the model's own rows, before or after RoPE, and what the loss thinks of them."""

import gc

import pytest
import torch
from cases import SIZES, assert_close, new_model, prompt, tiny_model
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, LlamaConfig

from hf_kvcache.calibration import fit_bases, logits_behind, observe
from hf_kvcache.calibration.text import token_batches
from hf_kvcache.compat import cache_argument
from hf_kvcache.view import KVView

GROUPS = {"k": 1, "v": "all"}


def projections(model, ids, layer):
    """Outputs `[n, Hkv * D]` of the projections of a layer, and their gradients, by hooks on the modules."""
    attention, seen = model.model.layers[layer].self_attn, {}

    def keep(side):
        def hook(module, inputs, output):
            output.retain_grad()
            seen[side] = output

        return hook

    handles = [getattr(attention, f"{side}_proj").register_forward_hook(keep(side)) for side in "kv"]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return {side: (t.detach()[0], t.grad[0]) for side, t in seen.items()}


@pytest.mark.parametrize("layer", [0, 1])
def test_rows_and_gradients_are_those_of_the_projections(layer):
    model = new_model(LlamaConfig(**SIZES))
    ids = prompt(1, 50)
    seen = observe(model, [ids], group_sizes=GROUPS, with_gradients=True, n_sink=4)[layer]
    for side, (rows, gradients) in projections(model, ids, layer).items():
        for moments, expected in ((seen.rows[side], rows), (seen.gradients[side], gradients)):
            expected = expected[4:].unflatten(1, (moments.total.shape[0], -1)).transpose(0, 1).double()  # [G, n, s*D]
            assert moments.count == 46
            scale = expected.abs().max()
            assert_close("sum", moments.total / scale, expected.sum(1) / scale, 1e-3)
            second = expected.transpose(1, 2) @ expected
            assert_close("second moments", moments.second / scale**2, second / scale**2, 1e-3)


def views():
    gc.collect()
    return {id(x) for x in gc.get_objects() if type(x) is KVView}


def test_nothing_is_held_when_all_is_seen():
    # a hook on a gradient is out of the garbage collector's sight: rows that lead to it would stay for ever
    before = views()
    observe(new_model(LlamaConfig(**SIZES)), [prompt(1, 50)], group_sizes=GROUPS, with_gradients=True)
    assert not views() - before


def test_after_rope_keys_are_those_that_a_cache_gets():
    model = tiny_model("llama")
    ids = prompt(1, 50)
    cache = DynamicCache()
    model(ids, **cache_argument(cache))
    seen = observe(model, [ids], rope="post", group_sizes=GROUPS, n_sink=0)
    keys = cache.layers[1].keys[0].double()
    assert_close("second moments", seen[1].rows["k"].second, keys.transpose(1, 2) @ keys, 1e-3)


def test_every_batch_counts_and_weights_stay_as_they_were():
    model = new_model(LlamaConfig(**SIZES))
    model.train()
    model.lm_head.weight.requires_grad_()
    before = [p.detach().clone() for p in model.parameters()]
    seen = observe(model, [prompt(2, 30), prompt(1, 20)], group_sizes=GROUPS, with_gradients=True, n_sink=0)
    assert seen[0].rows["k"].count == seen[0].gradients["v"].count == 80
    assert seen[0].queries.count == 2 * 80
    assert model.training and model.lm_head.weight.requires_grad
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_the_first_tokens_stay_as_they_are():
    """As in a cache: a basis that never saw a model's sinks would take them away."""
    model = tiny_model("llama")
    ids = prompt(1, 40)
    bases = fit_bases(model, [prompt(1, 120)], rank=0.25, allocator="uniform")
    ours, theirs = logits_behind(model, ids, bases.of, "pre", n_sink=8), model(ids).logits
    assert_close("logits", ours[:, :8], theirs[:, :8], 1e-5)
    assert (ours - theirs)[:, 8:].abs().amax(-1).min() > 1e-3


def test_the_former_name_of_an_argument_still_works():
    model, ids = tiny_model("llama"), prompt(1, 20)
    with pytest.warns(UserWarning, match="n_sink"):
        former = observe(model, [ids], group_sizes=GROUPS, n_skip=3)
    now = observe(model, [ids], group_sizes=GROUPS, n_sink=3)
    assert former[0].rows["k"].count == now[0].rows["k"].count == 17


def test_logits_behind_nothing_are_the_model_s():
    model, ids = tiny_model("llama"), prompt(1, 40)
    assert_close("logits", logits_behind(model, ids, lambda layer, side: None, "pre"), model(ids).logits, 1e-6)


def test_samples_of_a_text():
    ids = torch.arange(100)
    assert [batch[0, 0].item() for batch in token_batches(ids, 30, 2)] == [0, 70]
    assert len(list(token_batches(ids, 30, 50))) == 3
    with pytest.raises(ValueError, match="one sample needs 101"):
        next(token_batches(ids, 101, 1))
