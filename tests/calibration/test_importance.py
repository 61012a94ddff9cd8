"""Targets of retaining heads, block by block, are what the formulas say of whole tensors."""

import pytest
import torch
from cases import assert_close

from hf_kvcache.calibration.importance import answer_max, attention_mass, causal_max, reconstruction

B, HQ, HKV, D = 2, 6, 2, 8
BLOCKS = [(256, 4096), (7, 13), (1, 1), (64, 5)]
SCALING = D**-0.5


def rows(heads, n, seed):
    return 3 * torch.randn(B, heads, n, D, generator=torch.Generator().manual_seed(seed))


def naive(q, k):
    """Scaled scores of every query head with the keys of its group, `[B, Hkv, G, S, N]`, in float64."""
    k = k.double().repeat_interleave(HQ // HKV, 1)
    return (q.double() @ k.mT * SCALING).unflatten(1, (HKV, -1))


def left_padding(n, lengths):
    return torch.arange(n) >= n - torch.tensor(lengths).unsqueeze(1)  # [B, n]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("n_answer, n_prompt", [(1, 1), (17, 63), (5, 101)])
def test_answer_max(n_answer, n_prompt, block):
    q, k = rows(HQ, n_answer, 0), rows(HKV, n_prompt, 1)
    expected = naive(q, k).amax((2, 3))
    ours = answer_max(q, k, SCALING, block=block)
    assert ours.dtype == torch.float32 and ours.shape == (B, HKV, n_prompt)
    assert_close("label", ours / expected.abs().max(), expected / expected.abs().max(), 1e-6)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_answer_max_of_padded_rows_is_that_of_the_rows_alone(block):
    q, k = rows(HQ, 17, 0), rows(HKV, 63, 1)
    n_answer, n_prompt = (17, 3), (40, 63)
    q_is_real = left_padding(17, n_answer).flip(1)  # answers are padded on the right
    k_is_real = left_padding(63, n_prompt)
    ours = answer_max(q, k, SCALING, q_is_real=q_is_real, k_is_real=k_is_real, block=block)
    for b in range(B):
        alone = answer_max(q[b : b + 1, :, : n_answer[b]], k[b : b + 1, :, 63 - n_prompt[b] :], SCALING)
        assert_close("label", ours[b, :, 63 - n_prompt[b] :], alone[0], 1e-5)
    assert (ours[0, :, :23] == -torch.inf).all()


def test_sixteen_bit_rows_are_scored_in_float32():
    q, k = rows(HQ, 9, 0).bfloat16(), rows(HKV, 20, 1).bfloat16()
    expected = naive(q, k).amax((2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert_close("label", answer_max(q, k, SCALING), expected, 1e-4)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("gap", [0, 1, 10, 100])
def test_causal_max(gap, block):
    n = 51
    q, k = rows(HQ, n, 0), rows(HKV, n, 1)
    i = torch.arange(n)
    scores = naive(q, k).masked_fill(i + gap > i.unsqueeze(1), -torch.inf)
    ours, expected = causal_max(q, k, SCALING, gap=gap, block=block), scores.amax((2, 3))
    assert torch.equal(ours.isfinite(), expected.isfinite())
    assert (ours.isfinite().sum(-1) == max(n - gap, 0)).all()
    assert_close("label", ours.nan_to_num(neginf=0), expected.nan_to_num(neginf=0), 2e-5)


def test_causal_max_of_padded_rows_is_that_of_the_rows_alone():
    q, k, is_real = rows(HQ, 51, 0), rows(HKV, 51, 1), left_padding(51, (30, 51))
    ours = causal_max(q, k, SCALING, gap=4, is_real=is_real, block=(7, 13))
    alone = causal_max(q[:1, :, 21:], k[:1, :, 21:], SCALING, gap=4)
    assert torch.equal(ours[0, :, 21:].isfinite(), alone[0].isfinite())
    assert_close("label", ours[0, :, 21:-4], alone[0, :, :-4], 1e-5)
    assert (ours[0, :, :21] == -torch.inf).all()


def log_weights(q, k):
    """Causal log softmax of the last queries `[B, Hkv, G, R, N]`."""
    n_new, n = q.shape[2], k.shape[2]
    places = torch.arange(n - n_new, n).unsqueeze(1)
    return naive(q, k).masked_fill(torch.arange(n) > places, -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_reconstruction_and_mass(block):
    n_prompt, n_between, n_repeated = 33, 5, 32
    q, k = rows(HQ, n_repeated, 0), rows(HKV, n_prompt + n_between + n_repeated, 1)
    expected = log_weights(q, k)[..., :n_prompt]
    ours = reconstruction(q, k, SCALING, n_prompt, block=block)
    assert (ours < 1e-5).all()
    assert_close("log weight", ours, expected.amax((2, 3)), 2e-5)
    mass = attention_mass(q, k, SCALING, n_prompt, block=block)
    assert_close("mass", mass, expected.exp().sum((2, 3)), 1e-5)


def test_reconstruction_and_mass_of_padded_rows_are_those_of_the_rows_alone():
    n_prompt, n = 33, 60
    q, k = rows(HQ, 20, 0), rows(HKV, n, 1)
    is_real = left_padding(n, (50, 60)) & left_padding(n, (60, 57)).flip(1)
    ours, mass = (f(q, k, SCALING, n_prompt, is_real=is_real, block=(7, 13)) for f in (reconstruction, attention_mass))
    alone = [f(q[:1], k[:1, :, 10:], SCALING, n_prompt - 10) for f in (reconstruction, attention_mass)]
    assert_close("log weight", ours[0, :, 10:], alone[0][0], 1e-5)
    assert_close("mass", mass[0, :, 10:], alone[1][0], 1e-5)
    assert (ours[0, :, :10] == -torch.inf).all() and (mass[0, :, :10] == 0).all()
    alone = [f(q[1:, :, :-3], k[1:, :, :-3], SCALING, n_prompt) for f in (reconstruction, attention_mass)]
    assert_close("log weight", ours[1], alone[0][0], 1e-5)
    assert_close("mass", mass[1], alone[1][0], 1e-5)


def test_no_tensor_is_larger_than_a_block():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.n = max(self.n, out.numel())
            return out

    q, k = rows(HQ, 200, 0), rows(HKV, 300, 1)
    largest = Largest()
    with largest:
        answer_max(q, k, SCALING, block=(16, 32))
        causal_max(q[:, :, :200], k[:, :, :200], SCALING, block=(16, 32))
        reconstruction(q[:, :, :100], k, SCALING, 200, block=(16, 32))
    assert largest.n <= max(B * HQ * 16 * 32, q.numel())
