"""Relaxed decisions: running means, what hides a row, and their gradients."""

import math

import pytest
import torch
from cases import recompute
from tiny_retrofits import CACHES, batch, retrofitted, settings, whole

from hf_kvcache.compat import cache_argument
from hf_kvcache.dmc import Settings, decide, draw_noise, merge, retrofits
from hf_kvcache.dmc.attention import attend_parallel
from hf_kvcache.dmc.decisions import harden, logistic_noise, opens, relax
from hf_kvcache.dmc.hooks import Call
from hf_kvcache.dmc.masks import FOREVER, expiry, hiding_bias
from hf_kvcache.dmc.merging import Past

B, H, D = 2, 3, 4


def tokens(S, seed=0, hard=False, n=0):
    """Rows, weights and decisions of `S` tokens, and of `n` members before them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, H, n + S, D, generator=generator, dtype=torch.float64)
    omega = torch.rand(B, H, n + S, generator=generator, dtype=torch.float64) + 0.01
    p = torch.rand(B, H, n + S, generator=generator, dtype=torch.float64) ** 0.3
    return x, omega, (p > 0.4 if hard else p)


def by_loop(x, omega, p, window):
    """`sum_d C_{t,d} omega_{t-d} x_{t-d}` over `sum_d C_{t,d} omega_{t-d}`, as the formula says."""
    p, out = p.to(x.dtype), torch.empty_like(x)
    for t in range(x.shape[2]):
        chain, total, z = torch.ones(B, H, dtype=x.dtype), 0, 0
        for d in range(t + 1 if not window else min(window, t + 1)):
            weight = chain * omega[:, :, t - d]
            total, z = total + weight.unsqueeze(-1) * x[:, :, t - d], z + weight
            chain = chain * p[:, :, t - d]
        out[:, :, t] = total / z.unsqueeze(-1)
    return out


@pytest.mark.parametrize("hard", [False, True], ids=["relaxed", "hard"])
@pytest.mark.parametrize("S", [1, 2, 11, 63, 64, 65, 130])
@pytest.mark.parametrize("window", [1, 3, 12, 70, 0])
def test_running_means(window, S, hard):
    x, omega, p = tokens(S, hard=hard)
    assert (merge(x, omega, p, window) - by_loop(x, omega, p, window)).abs().max() <= 1e-12


@pytest.mark.parametrize("S", [1, 2, 12, 70])
@pytest.mark.parametrize("window, n", [(1, 0), (3, 2), (12, 11), (12, 4), (0, 1), (0, 3)])
def test_an_open_segment_goes_on(window, n, S):
    x, omega, p = tokens(S, n=n)
    # members of the past hang together: what they have lost is in their weights
    p[..., :n] = 1
    past = Past(x[:, :, :n], omega[..., :n])
    ours = merge(x[:, :, n:], omega[..., n:], p[..., n:], window, past)
    assert (ours - by_loop(x, omega, p, window)[:, :, n:]).abs().max() <= 1e-12


def test_what_carries_no_weight_does_not_count():
    x, omega, p = tokens(9, n=2)
    past = Past(torch.full((B, H, 2, D), 1e9, dtype=torch.float64), torch.zeros(B, H, 2, dtype=torch.float64))
    ours = merge(x[:, :, 2:], omega[..., 2:], p[..., 2:], 3, past)
    assert (ours - merge(x[:, :, 2:], omega[..., 2:], p[..., 2:], 3)).abs().max() <= 1e-12


@pytest.mark.parametrize("window", [3, 0])
def test_half_precision_is_summed_in_float32(window):
    x, omega, _ = tokens(200)
    x, p = x.bfloat16(), torch.ones(B, H, 200, dtype=torch.bool)
    exact = merge(x.double(), omega, p, window)
    ours = merge(x, omega.float(), p, window)
    assert ours.dtype == torch.bfloat16
    # one rounding, at the end
    assert ((ours - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("with_past", [False, True], ids=["alone", "past"])
@pytest.mark.parametrize("window", [1, 3, 12, 0])
def test_gradients_of_merge(window, with_past):
    n = (window - 1 if window else 1) if with_past else 0
    x, omega, p = (t[:1, :2] for t in tokens(6, n=n))

    def run(x, omega, p):
        past = Past(x[:, :, :n], omega[..., :n]) if with_past else None
        return merge(x[:, :, n:], omega[..., n:], p[..., n:], window, past)

    assert torch.autograd.gradcheck(run, [t.contiguous().requires_grad_() for t in (x, omega, p)])


def test_gradients_of_merge_across_blocks():
    # cheap: only a direction, over more than one block of 64
    x, omega, p = (t.requires_grad_() for t in tokens(70))
    for window in (5, 0):
        ours = torch.autograd.grad(merge(x, omega, p, window).pow(2).sum(), (x, omega, p))
        loop = torch.autograd.grad(by_loop(x, omega, p, window).pow(2).sum(), (x, omega, p))
        for a, b in zip(ours, loop):
            assert (a - b).abs().max() <= 1e-10


# -- decisions -----------------------------------------------------------------------------------------------------


def test_logits_and_weights():
    raw, importance = torch.tensor([[[0.1], [0.5]]]), torch.tensor([[[-5.0], [0.0]]])
    logits, omega = decide(Settings(scale=20.0, offset=5.0), raw, importance)
    assert torch.allclose(logits, torch.tensor([[[-3.0], [5.0]]]))
    expected = torch.tensor([[[0.5], [1 / (1 + math.exp(-5.0))]]]) + 2**-7
    assert torch.allclose(omega, expected)
    together, _ = decide(Settings(scale=20.0, offset=5.0, per="layer"), raw, importance)
    assert torch.allclose(together, torch.tensor([[[1.0], [1.0]]]))
    assert decide(Settings("dms"), raw)[1] is None


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_half_precision_decides_in_float32(scale):
    raw = torch.tensor([[[5.03125 / scale]]]).bfloat16()
    logits, omega = decide(Settings(scale=scale), raw, raw)
    assert logits.dtype == omega.dtype == torch.float32
    assert logits.item() == scale * raw.float().item() - 5


def test_the_first_real_token_of_a_row_has_nothing_before_it():
    logits = torch.ones(2, 1, 4)
    is_real = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]).bool()

    def decisions(*known):
        return harden(logits, opens(logits, *known))[:, 0].tolist()

    assert decisions(None, None) == [[False, True, True, True]] * 2
    assert decisions(is_real, None) == [[False, True, True, True], [False, False, False, True]]
    begun = torch.tensor([True, False])
    assert decisions(is_real, begun) == [[True] * 4, [False, False, False, True]]
    # zero is no decision
    assert not harden(torch.zeros(1, 1, 3)).any()


def test_relaxed_decisions():
    logits = torch.tensor([[[-1.0, 0.0, 2.0]]], dtype=torch.float64)
    noise = torch.tensor([[[0.5, 0.0, -1.0]]], dtype=torch.float64)
    p, left = relax(logits, noise, 0.5)
    assert torch.allclose(p, torch.sigmoid(torch.tensor([[[-1.0, 0.0, 2.0]]], dtype=torch.float64)))
    assert torch.allclose(left, torch.log1p(-p))
    # where 1 - p is no number any more, its log is
    assert relax(torch.tensor([100.0]), None, 0.1)[1].item() == -1000


def test_noise_is_logistic():
    noise = logistic_noise((100_000,), torch.Generator().manual_seed(0))
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.03 and abs(noise.var() - math.pi**2 / 3) < 0.1
    for a in (-2.0, 0.0, 1.0):
        assert abs((noise + a > 0).float().mean() - torch.sigmoid(torch.tensor(a))) < 0.01


# -- what hides a row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0, 1, 3, 10])
def test_bias(delay):
    T = 6
    left = -torch.rand(1, 2, T, generator=torch.Generator().manual_seed(0))
    bias = hiding_bias(left, delay)
    for h in range(2):
        for i in range(T):
            for t in range(T):
                expected = -math.inf if t > i else left[0, h, t + 1].item() if i - t > delay else 0.0
                assert bias[0, h, i, t].item() == expected


def test_expiry():
    alpha = torch.tensor([[[0, 1, 0, 1, 1]], [[0, 0, 0, 1, 0]]]).bool()
    is_real = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
    assert expiry(alpha, None, 10, 0)[0, 0].tolist() == [10, FOREVER, 12, 13, FOREVER]
    assert expiry(alpha, is_real, 10, 7)[:, 0].tolist() == [
        [17, FOREVER, 19, 20, FOREVER],
        [-1, -1, 19, FOREVER, FOREVER],
    ]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("method, window", [("dmc", 2), ("dmc", 0), ("dms", 0), ("dms", 2)])
def test_gradients_through_attention(method, window, softcap):
    # G = 2, a padded row, a temperature at which every decision is soft
    chosen = settings(method, window=window, scale=1.0, offset=0.2, tau=1.0)
    T = 5
    generator = torch.Generator().manual_seed(0)

    def new(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v, decision, importance = new(2, 4, T, D), new(2, 2, T, D), new(2, 2, T, D), new(2, 2, T), new(2, 2, T)
    noise, is_real = new(2, 2, T), torch.ones(2, T, dtype=torch.bool)
    is_real[1, :2] = False
    mask = torch.ones(T, T, dtype=torch.bool).tril() & is_real[:, None, None]

    def run(q, k, v, decision, importance):
        call = Call(chosen, None, is_real, True)
        call.resolve(decision, importance if chosen.merges else None, noise)
        k, v = (call.merged(x.transpose(1, 2), side).transpose(1, 2) for side, x in (("k", k), ("v", v)))
        return attend_parallel(q, k, v, mask, call, 0.5, softcap)

    inputs = [t.requires_grad_() for t in (q, k, v, decision, importance)]
    out = run(*inputs)
    assert (torch.autograd.grad(out.sum(), decision)[0].abs() > 0).sum() >= 4
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


# -- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "knobs",
    [
        dict(G=4),
        dict(window=3, decision="rows", bias=[0.1]),
        dict(window=0, decision="linear"),
        dict(method="dms", window=3, G=4),
        dict(method="dms", window=0, per="layer", zero_after_rope=True),
    ],
    ids=str,
)
@torch.no_grad()
def test_saturated_decisions_are_those_of_inference(knobs, padded):
    model = retrofitted(n_layers=2, tau=1e-7, **knobs)
    inputs = batch([20, 9] if padded else [20, 20])
    is_real = inputs[1].bool()
    hard = whole(model, *inputs)
    draw_noise(model, 2, 20, seed=0)
    for child in retrofits(model).values():
        # too small to turn a decision
        child.noise *= 1e-6
    relaxed = whole(model.train(), *inputs)
    assert (hard - relaxed)[is_real].abs().max() <= 1e-10
    calls = [child.call for child in retrofits(model).values()]
    assert all(call.is_relaxed and torch.equal(call.p > 0.5, call.alpha) for call in calls)
    # and not because nothing was decided
    assert all(call.alpha.any() for call in calls)


def gradients(model, inputs, seed):
    draw_noise(model, *inputs[0].shape, seed=seed)
    for weight in model.parameters():
        weight.grad = None
    loss = whole(model, *inputs).log_softmax(-1)[..., 5].mean()
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("knobs", [dict(), dict(decision="linear", method="dms", window=3)], ids=["dmc", "dms"])
def test_noise_comes_from_outside(knobs):
    model = retrofitted(n_layers=2, **knobs).requires_grad_(True).train()
    inputs = batch([20, 9])
    loss, own = gradients(model, inputs, seed=3)
    assert gradients(model, inputs, seed=3)[0] == loss
    assert gradients(model, inputs, seed=4)[0] != loss
    noise = [child.noise for child in retrofits(model).values()]
    assert not torch.equal(*noise)
    # recomputed layers find the same noise
    recompute(model)
    again, recomputed = gradients(model, inputs, seed=3)
    assert again == loss
    for name, gradient in own.items():
        assert (gradient is None) == (recomputed[name] is None)
        assert gradient is None or torch.allclose(gradient, recomputed[name], atol=1e-12), name
    # decisions learn
    deciding = [name for name in own if "kv_dmc" in name or "k_proj" in name and not knobs]
    assert deciding and all(own[name].abs().max() > 0 for name in deciding)


def test_training_has_no_cache():
    model, (ids, *_) = retrofitted().train(), batch([8])
    with pytest.raises(RuntimeError, match="eval"):
        model(ids, **cache_argument(CACHES["dmc"]()))
