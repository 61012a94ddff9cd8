"""What a retrofit is trained for, and the models it starts from and ends with."""

import copy
import math
import pkgutil
from importlib import import_module

import pytest
import torch
from tiny_retrofits import CACHES, batch, feed, lengths, llama, retrofitted, settings, whole

from hf_kvcache import dmc
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.dmc import Settings, compression_off, draw_noise, merge_weights, retrofit, retrofits, zero_rows
from hf_kvcache.dmc.hooks import Call
from hf_kvcache.dmc.objective import distillation, hinge, merged_share, ramp, straight_through

# -- the ratio asked for -------------------------------------------------------------------------------------------


def test_ramp_is_linear_in_the_ratio():
    assert [ramp(step, 100, 4.0) for step in (0, 50, 100, 1000)] == [1.0, 2.5, 4.0, 4.0]
    assert ramp(7, 0, 8.0) == 8.0


def test_hinge_asks_for_no_more_than_the_target():
    # at 2.5 tokens per row, 0.6 of the tokens have none
    share = torch.tensor([[[0.6, 0.6], [0.2, 1.0]], [[0.9, 0.9], [0.9, 0.9]]])
    assert hinge(share, 2.5).item() == pytest.approx(0, abs=1e-7)
    assert hinge(share * 0, 2.5).item() == pytest.approx(0.6)
    # one sample does not make up for another
    assert hinge(torch.stack([torch.zeros(2, 2), torch.ones(2, 2)]), 2.5).item() == pytest.approx(0.3)
    assert hinge(share, 1.0).item() == 0
    # every head by itself: only the one at 0.2 is behind
    assert hinge(share, 2.5, is_constant=True).item() == pytest.approx(0.4 / 8)


def test_hinge_pushes_only_who_is_behind():
    share = torch.tensor([[[0.1, 0.2]], [[0.9, 0.9]]], requires_grad=True)
    (gradient,) = torch.autograd.grad(hinge(share, 4.0), share)
    assert (gradient[0] < 0).all() and (gradient[1] == 0).all()


def relaxed_call(logits, is_real=None):
    call = Call(Settings(tau=1.0), None, is_real, True)
    call.logits = logits
    call.p = torch.sigmoid(logits)
    return call


def test_decisions_are_hard_forward_and_relaxed_backward():
    logits = torch.tensor([[[-1.0, 0.2, 3.0]]], requires_grad=True)
    alpha = straight_through(relaxed_call(logits))
    assert alpha.tolist() == [[[0.0, 1.0, 1.0]]]
    (gradient,) = torch.autograd.grad(alpha.sum(), logits)
    p = torch.sigmoid(logits.detach())
    assert torch.allclose(gradient, p * (1 - p))


def test_decisions_without_a_gradient_are_an_error():
    with pytest.raises(RuntimeError, match="no gradient"):
        straight_through(relaxed_call(torch.zeros(1, 1, 3)))
    with torch.no_grad():
        assert straight_through(relaxed_call(torch.zeros(1, 1, 3))).tolist() == [[[0.0] * 3]]


def test_padding_has_no_share():
    logits = torch.tensor([[[-9.0, 9, 9, 9]], [[9.0, 9, -9, 9]]], requires_grad=True)
    is_real = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]).bool()
    share = merged_share({3: relaxed_call(logits, is_real), 5: relaxed_call(logits)})
    assert share.shape == (2, 2, 1)
    assert share[:, 0, 0].tolist() == [0.75, 0.5] and share[:, 1, 0].tolist() == [0.75, 0.75]


def test_the_share_of_a_model_is_what_its_cache_saves():
    # saturated, so that the noisy draw is the decision
    model = retrofitted(n_layers=2, tau=1e-7, window=3)
    inputs, cache = batch([30, 12]), CACHES["dmc"]()
    with torch.no_grad():
        feed(model, cache, *inputs, [30])
        whole(model.train(), *inputs)
        share = merged_share({i: child.call for i, child in retrofits(model).items()})
    rows = lengths(cache).transpose(0, 1)  # [B, L, Hkv]
    n = torch.tensor([30, 12]).view(2, 1, 1)
    assert torch.allclose(share, 1 - rows / n.double())


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_distillation(direction):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 7, generator=generator) for _ in range(2))
    p, q = (student, teacher) if direction == "reverse" else (teacher, student)
    expected = torch.zeros(2, 3)
    for b in range(2):
        for t in range(3):
            a, c = p[b, t].softmax(-1), q[b, t].softmax(-1)
            expected[b, t] = sum(a[i] * math.log(a[i] / c[i]) for i in range(7))
    assert torch.allclose(distillation(student, teacher, direction), expected.mean(), atol=1e-6)
    keep = torch.tensor([[1, 0, 1], [0, 0, 1]]).bool()
    assert torch.allclose(distillation(student, teacher, direction, keep), expected[keep].mean(), atol=1e-6)
    assert distillation(student, student, direction).abs() < 1e-6


# -- models --------------------------------------------------------------------------------------------------------


def ablated(model, method, neuron=-1):
    """By hand: the weights that make a channel of keys and queries (DMC), or of first queries (DMS), zero."""
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            H, D, G = model.config.num_key_value_heads, attention.head_dim, attention.num_key_value_groups
            queries = attention.q_proj.weight.view(H, G, D, -1)
            if method == "dmc":
                queries[:, :, neuron] = 0
                attention.k_proj.weight.view(H, D, -1)[:, neuron] = 0
            else:
                queries[:, 0, neuron] = 0
    return model


@torch.no_grad()
@pytest.mark.parametrize("neuron", [-1, 2])
@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("method", ["dmc", "dms"])
def test_zeroed_rows_keep_everything(method, G, neuron):
    inputs = batch([25, 9])
    is_real = inputs[1].bool()
    wanted = whole(ablated(llama(2, G), method, neuron), *inputs)
    model = llama(2, G)
    retrofit(model, Settings(method, window=2, neuron=neuron))
    zero_rows(model)
    assert (whole(model, *inputs) - wanted)[is_real].abs().max() <= 1e-12
    cache = CACHES[method]()
    logits = feed(model, cache, *inputs, [10, 1, 14])
    assert (logits - wanted)[is_real].abs().max() <= 1e-12
    assert (lengths(cache) == torch.tensor([25, 9]).view(1, 2, 1)).all()
    # the channel was worth something
    assert (whole(llama(2, G), *inputs) - wanted)[is_real].abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("method", ["dmc", "dms"])
def test_a_teacher_only_lacks_the_channel(method):
    inputs = batch([25, 9])
    is_real = inputs[1].bool()
    model = retrofitted(method, n_layers=2, G=4, window=2)
    student = whole(model, *inputs)
    with compression_off(model):
        teacher = whole(model, *inputs)
    assert (teacher - whole(ablated(llama(2, 4), method), *inputs))[is_real].abs().max() <= 1e-12
    assert (teacher - student)[is_real].abs().max() > 1e-3
    assert torch.equal(whole(model, *inputs), student)
    linear = retrofitted(method, n_layers=2, G=4, window=2, decision="linear")
    with compression_off(linear):
        assert torch.equal(whole(linear, *inputs), whole(llama(2, 4), *inputs))


@torch.no_grad()
@pytest.mark.parametrize("method", ["dmc", "dms"])
def test_the_channel_fades(method):
    inputs = batch([25, 9])
    is_real = inputs[1].bool()
    model = retrofitted(method, n_layers=2, G=4)
    logits = []
    with compression_off(model):
        for fade in (1.0, 0.5, 0.0):
            for child in retrofits(model).values():
                child.fade = fade
            logits.append(whole(model, *inputs))
    assert (logits[0] - whole(llama(2, 4), *inputs))[is_real].abs().max() <= 1e-12
    assert (logits[1] - logits[0])[is_real].abs().max() > 1e-3 < (logits[1] - logits[2])[is_real].abs().max()


@torch.no_grad()
@pytest.mark.parametrize("zero_after_rope", [False, True])
@pytest.mark.parametrize("method", ["dmc", "dms"])
def test_folded_rows_decide_the_same(method, zero_after_rope):
    inputs = batch([25, 9])
    is_real = inputs[1].bool()
    knobs = dict(window=3, decision="rows", bias=[0.1], zero_after_rope=zero_after_rope)
    model = retrofitted(method, n_layers=2, G=4, **knobs)
    before, cache = whole(model, *inputs), CACHES[method]()
    merge_weights(model)
    assert not [name for name in model.state_dict() if "kv_dmc" in name]
    assert all(child.settings.decision == "borrowed" for child in retrofits(model).values())
    assert (whole(model, *inputs) - before)[is_real].abs().max() <= 1e-12
    assert (feed(model, cache, *inputs, [12] + [1] * 13) - before)[is_real].abs().max() <= 1e-10
    with pytest.raises(AdapterError, match="rows"):
        merge_weights(model)


@pytest.mark.parametrize("decision", ["rows", "linear"])
@pytest.mark.parametrize("method", ["dmc", "dms"])
def test_own_weights_start_by_keeping_everything(method, decision):
    model = llama(2)
    retrofit(model, Settings(method, decision=decision))
    inputs, cache = batch([25, 9]), CACHES[method]()
    with torch.no_grad():
        feed(model, cache, *inputs, [25])
    assert cache.compression_ratio > 0 and (lengths(cache) == torch.tensor([25, 9]).view(1, 2, 1)).all()
    # and can learn not to
    draw_noise(model, 2, 25, seed=0)
    whole(model.train(), *inputs)
    hinge(merged_share({i: child.call for i, child in retrofits(model).items()}), 4.0).backward()
    assert all(child.decision.grad.abs().max() > 0 for child in retrofits(model).values())


def test_a_copy_of_a_model_decides_for_itself():
    model, inputs = retrofitted(decision="linear", bias=[0.1]), batch([25, 9])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = whole(model, *inputs)
        assert torch.equal(whole(twin, *inputs), before)
        for child in retrofits(twin).values():
            child.decision.zero_()
        assert not torch.equal(whole(twin, *inputs), before)
        assert torch.equal(whole(model, *inputs), before)


def test_once_only():
    model = retrofitted()
    with pytest.raises(AdapterError, match="retrofitted already"):
        retrofit(model, settings())


@pytest.mark.parametrize(
    "knobs, message",
    [
        (dict(method="dmx"), "dmc, dms"),
        (dict(decision="own"), "borrowed, rows, linear"),
        (dict(per="token"), "head, layer"),
        (dict(window=-1), "window=-1"),
        (dict(window=2.5), "window=2.5"),
        (dict(tau=0), "tau=0"),
        (dict(offset=-5.0), "offset=-5.0"),
        (dict(scale=float("inf")), "scale=inf"),
        (dict(zero_after_rope=1), "zero_after_rope=1"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(knobs, message):
    with pytest.raises(ValueError, match=message):
        Settings(**knobs)


def test_settings_come_back_whole():
    chosen = settings("dms", window=7, per="layer")
    assert Settings.from_dict(chosen.to_dict()) == chosen
    for values in (chosen.to_dict() | {"colour": 1}, {"method": "dms"}, chosen.to_dict() | {"window": None}):
        with pytest.raises(ValueError, match="must say"):
            Settings.from_dict(values)
    assert (Settings("dmc").window, Settings("dms").window) == (12, 256)
    assert (Settings("dmc").scale, Settings("dms").scale) == (20, 100)


def test_functions_are_not_hidden_by_modules():
    for module in pkgutil.iter_modules(dmc.__path__):
        import_module(f"{dmc.__name__}.{module.name}")
    assert all(callable(getattr(dmc, name)) for name in dmc.__all__)


def test_trains_after_inference():
    model, inputs = retrofitted().requires_grad_(True), batch([12])
    with torch.inference_mode():
        whole(model, *inputs)
    whole(model.train(), *inputs).sum().backward()
