"""Triton kernels of `merge_step` and `slot_step` against the reference; where they run is said in `test_triton.py`."""

import pytest
import torch
from rooms import telling
from test_triton import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    LOW,
    ON_GPU,
    OUT,
    assert_close,
    run_in_the_interpreter,
    runs_kernels,
)

from hf_kvcache.kernels import BackendUnavailable, use_backend
from hf_kvcache.kernels.merge_step import merge_step
from hf_kvcache.kernels.slot_step import place_rows, reference, slot_step


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests below run here directly")
def test_in_the_interpreter(pytestconfig):
    run_in_the_interpreter(__file__, config=pytestconfig)


@runs_kernels
@pytest.mark.parametrize("segment", telling(["own", "fp32"], "own"))
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    "case", [(1, 8, 12, 128), (2, 3, 5, 80), (2, 1, 1, 8), (1, 2, 64, 256), (1, 1, 17, 47)], ids=str
)
def test_mean(case, dtype, segment):
    B, H, w, D = case
    torch.manual_seed(w)
    dtype = DTYPES[dtype]
    x = torch.randn(B, D, H, device=DEVICE).to(dtype).mT
    weights = torch.rand(B, H, w, device=DEVICE) * (torch.rand(B, H, w, device=DEVICE) < 0.6)
    segment = torch.randn(B, H, 1, w, D, device=DEVICE).to(dtype if segment == "own" else torch.float32)[:, :, 0]
    for cell in {0, w // 2, w - 1}:
        weights[..., cell] = 0.7
        seen = segment.clone()
        seen[:, :, cell] = x
        want = (weights.unsqueeze(-1).double() * seen.double()).sum(2) / weights.double().sum(-1, keepdim=True)
        # what is not part of the segment is not read
        segment = segment.masked_fill((weights == 0).unsqueeze(-1), float("nan"))
        with use_backend("triton"):
            out = merge_step(x, weights, segment, cell)
        assert out.dtype == dtype and out.shape == x.shape
        assert_close("mean", want, out, OUT[dtype])
        is_in = (weights != 0).unsqueeze(-1)
        assert torch.equal(segment.masked_fill(~is_in, 0), seen.masked_fill(~is_in, 0))
        segment = seen


@runs_kernels
def test_what_the_kernel_cannot_do_is_said():
    x, weights, segment = (torch.rand(1, 2, *shape, device=DEVICE) for shape in ((8,), (4,), (4, 8)))
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="not contiguous"):
        merge_step(x, weights, segment.mT.contiguous().mT, 1)
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="float64"):
        merge_step(x, weights.double(), segment, 1)


def empty(B, H, delay):
    pending = torch.full((B, H, 1, delay + 1), -1, dtype=torch.int32, device=DEVICE)
    return pending[:, :, 0], torch.zeros(B, H, dtype=torch.int32, device=DEVICE)


# delay, B, Hkv, share of decisions, share of padding anywhere, steps
RUNS = [(0, 1, 2, 0.5, 0, 20), (1, 2, 2, 0.9, 0.2, 30), (5, 2, 1, 0.6, 0.3, 40), (50, 1, 1, 0.9, 0, 110)]


@runs_kernels
@pytest.mark.parametrize("run", RUNS, ids=lambda r: "delay{}-b{}-h{}-p{}-padding{}-s{}".format(*r))
def test_slots_step_by_step(run):
    delay, B, H, p, padding, S = run
    torch.manual_seed(delay)
    alpha, is_real = torch.rand(B, H, S, device=DEVICE) < p, torch.rand(B, S, device=DEVICE) >= padding
    want, got = empty(B, H, delay), empty(B, H, delay)
    for t in range(S):
        real = is_real[:, t] if padding else None
        expected = reference.slot_step(alpha[..., t], real, *want, t)
        with use_backend("triton"):
            slot = slot_step(alpha[..., t], real, *got, t)
        for name, a, b in zip(("slot", "pending", "lengths"), (expected, *want), (slot, *got), strict=True):
            assert torch.equal(a, b), f"{name} at {t}"


@runs_kernels
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case", [(0, 1, 2, 16, 16, 0), (3, 2, 2, 80, 24, 0.3)], ids=str)
def test_rows_are_placed(case, dtype):
    delay, B, H, k_size, v_size, padding = case
    S, page = 24, 4
    torch.manual_seed(delay)
    alpha, is_real = torch.rand(B, H, S, device=DEVICE) < 0.5, torch.rand(B, S, device=DEVICE) >= padding
    # a row of a token may have any strides but that of channels
    k, v = (torch.randn(H, B, S, D, device=DEVICE).to(DTYPES[dtype]).transpose(0, 1) for D in (k_size, v_size))
    P = B * H * (S // page) + 1
    table = torch.randperm(P, device=DEVICE)[:-1].int().view(B, H, -1)
    states = [
        (*empty(B, H, delay), *(torch.zeros(P, 1, page, x.shape[3], dtype=x.dtype, device=DEVICE) for x in (k, v)))
        for _ in range(2)
    ]
    for t in range(S):
        row = k[:, :, t : t + 1], v[:, :, t : t + 1], alpha[..., t], is_real[:, t] if padding else None
        for backend, (pending, lengths, *pages) in zip(("reference", "triton"), states, strict=True):
            with use_backend(backend):
                place_rows(*row, pending, lengths, t, *pages, table)
    for name, a, b in zip(("pending", "lengths", "k", "v"), *states, strict=True):
        assert a.any() and torch.equal(a, b), name
