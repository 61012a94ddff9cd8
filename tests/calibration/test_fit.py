"""Bases of a model: exact budgets, and directions that beat what knows less."""

import pytest
import torch
from cases import SIZES, assert_close, new_model, prompt, tiny_model
from torch.nn.functional import kl_div, log_softmax
from transformers import LlamaConfig, Phi3Config, Qwen3Config

import hf_kvcache as kv
from hf_kvcache.calibration import fit_bases, logits_behind, observe
from hf_kvcache.calibration.ranks import ALLOCATORS
from hf_kvcache.calibration.weights import WeightGradients, projection_weight
from hf_kvcache.compat import cache_argument

TEXTS = [prompt(1, 120, seed=20 + i) for i in range(6)]
LARGER = {"head_dim": 64, "num_hidden_layers": 4, "hidden_size": 64}


def divergence(model, bases, ids):
    ours, theirs = (
        log_softmax(x.float(), -1) for x in (logits_behind(model, ids, bases.of, bases.rope), model(ids).logits)
    )
    return kl_div(ours, theirs, reduction="sum", log_target=True).item() / ids.numel()


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("name", ALLOCATORS)
def test_bytes_are_those_of_the_budget(name, rope):
    model = new_model(LlamaConfig(**SIZES | LARGER))
    bases = fit_bases(model, TEXTS[:2], rank=0.5, rope=rope, allocator=name)
    dense = 4 * 2 * 2 * 64 * 2
    positions = 4 * 4 if rope == "pre" else 0
    # a step of keys costs a sixteenth of a layer's budget here: what is left is less than one step of values
    assert 0.5 * dense - 32 < bases.nbytes_per_token(2) + positions <= 0.5 * dense
    model(TEXTS[0], **cache_argument(kv.LowRankCache(bases=bases, rope=rope, window=8)))


@pytest.mark.parametrize("rope", ["pre", "post"])
def test_everything_is_everything(rope):
    model = tiny_model("llama")
    bases = fit_bases(model, TEXTS[:2], rank=1.0, rope=rope)
    assert all(ranks == {"k": 16, "v": 32} for ranks in bases.ranks.values())
    assert_close("logits", logits_behind(model, TEXTS[3], bases.of, rope), model(TEXTS[3]).logits, 1e-4)


def test_looking_at_rows_beats_looking_at_weights():
    model = new_model(LlamaConfig(**SIZES | LARGER))

    def loss(kind):
        bases = fit_bases(model, TEXTS[:4], directions=kind, allocator="uniform")
        return sum(divergence(model, bases, text) for text in TEXTS[4:])

    assert loss("rows") < 0.9 * loss("weights")


def test_joint_values_beat_values_by_head():
    model = new_model(LlamaConfig(**SIZES | LARGER))

    def loss(group_size):
        bases = fit_bases(model, TEXTS[:4], group_size_v=group_size, allocator="uniform", directions="rows")
        return sum(divergence(model, bases, text) for text in TEXTS[4:])

    assert loss("all") < loss(1)


@pytest.mark.parametrize(
    "config",
    [Qwen3Config(**SIZES), Phi3Config(**{k: v for k, v in SIZES.items() if k != "head_dim"} | {"hidden_size": 64})],
)
def test_other_architectures(config):
    model = new_model(config)
    bases = fit_bases(model, TEXTS[:2], refine=1, allocator="fisher")
    model(TEXTS[0], **cache_argument(kv.LowRankCache(bases=bases, window=8)))


def test_refining_looks_behind_the_bases():
    model = tiny_model("llama")
    first = fit_bases(model, TEXTS[:2], rank=0.5, allocator="uniform", directions="rows")
    again = fit_bases(model, TEXTS[:2], rank=0.5, allocator="uniform", directions="rows", refine=1)
    # nothing comes before the first layer; the second one sees what the first one lost
    assert torch.equal(first.of(0, "k").down, again.of(0, "k").down)
    assert not torch.allclose(first.of(1, "k").down, again.of(1, "k").down, atol=1e-3)


def test_weight_gradients_are_those_of_the_samples():
    model = new_model(LlamaConfig(**SIZES))
    module = model.model.layers[0].self_attn
    scores = WeightGradients({0: module})
    groups = {"k": 1, "v": 1}
    observe(model, TEXTS[:2], group_sizes=groups, with_gradients=True, weights=scores.parameters, on_batch=scores.add)
    squares = 0
    for text in TEXTS[:2]:
        model.zero_grad()
        module.k_proj.weight.requires_grad_()
        model(text, labels=text).loss.backward()
        # labels are shifted once, by the model, and its loss is a mean
        squares = squares + (module.k_proj.weight.grad * (text.numel() - 1)).square()
    assert scores.score(0, "k") == pytest.approx((squares / 2).sqrt().mean().item(), rel=1e-3)


def test_fused_projections_are_cut_in_the_right_places():
    phi = tiny_model("phi3").model.layers[0].self_attn
    x = torch.randn(1, 1, 64)
    q, k, v = phi.qkv_proj(x).split([64, 32, 32], -1)
    assert_close("k", x @ projection_weight(phi, "k").T, k, 1e-5)
    assert_close("v", x @ projection_weight(phi, "v").T, v, 1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0.0}, "not a share"),
        ({"rank": 1.5}, "not a share"),
        ({"directions": "up"}, "directions='up' is not one of"),
        ({"allocator": "fair"}, "allocator='fair' is not one of"),
        ({"n_measured": 0}, "n_measured=0 must be"),
        ({"rank": 0.01}, "do not pay for one step"),
    ],
)
def test_arguments_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        fit_bases(tiny_model("llama"), TEXTS[:1], **{"allocator": "uniform", "directions": "rows"} | options)
