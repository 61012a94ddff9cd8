"""The running mean of one token: its definition, and the C++ backend on every instruction set this CPU has."""

import pytest
import torch
from rooms import on_levels

from hf_kvcache.dmc.merging import merge
from hf_kvcache.kernels import BackendUnavailable, choose, native, use_backend
from hf_kvcache.kernels.merge_step import merge_step

CPU = torch.device("cpu")
REASON = native.why_no_compiler()
# without a compiler there is nothing to test; a source that does not compile must fail
needs_compiler = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# one rounding of the result: sums are added in another order
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


isa = on_levels()


def operands(B, H, w, D, dtype, segment_dtype, n_zero=None):
    """A token, weights of which `n_zero` are zero (half of them unless said), and the segment of a `TrainedStore`."""
    torch.manual_seed(B + 10 * H + 100 * w + D)
    weights = torch.rand(B, H, 1, w) + 2**-7
    is_out = torch.rand(B, H, 1, w).argsort(-1) < (w // 2 if n_zero is None else n_zero)
    segment = torch.randn(B, H, 1, w, D).to(segment_dtype)
    return torch.randn(B, H, D).to(dtype), weights.masked_fill(is_out, 0)[:, :, 0], segment[:, :, 0]


def check(x, weights, segment, cell):
    """Native against the definition, in float64 from what is in memory."""
    weights[..., cell] = 0.7
    seen = segment.clone()
    seen[:, :, cell] = x
    want = torch.einsum("bhw,bhwd->bhd", weights.double(), seen.double()) / weights.double().sum(-1, keepdim=True)
    before = x.clone(), weights.clone()
    for backend in ("reference", "native"):
        written = segment.clone() if backend == "reference" else segment
        with use_backend(backend):
            got = merge_step(x, weights, written, cell)
        assert got.dtype == x.dtype and got.shape == x.shape
        assert torch.equal(written, seen), f"{backend}: segment"
        error = (got.double() - want).abs()
        # half a step of the result, and what float32 sums lose
        assert (error <= TOLERANCE[x.dtype] / 2 * want.abs() + 1e-6).all(), f"{backend}: mean, {error.max():.1e}"
    assert torch.equal(x, before[0]) and torch.equal(weights, before[1])


# B, Hkv, w, D: odd sizes, one cell, no whole register, every tail behind whole ones
CASES = [(1, 8, 12, 128), (2, 3, 12, 80), (3, 1, 1, 8), (1, 2, 64, 256), (2, 2, 5, 9), (1, 1, 12, 255), (2, 1, 3, 47)]


@needs_compiler
@pytest.mark.parametrize("segment", ["own", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "b{}-h{}-w{}-d{}".format(*c))
def test_mean(isa, case, dtype, segment):
    w = case[2]
    for cell in {0, w // 2, w - 1}:
        check(*operands(*case, dtype, dtype if segment == "own" else torch.float32), cell)


@needs_compiler
def test_strides_no_store_has(isa):
    for dtype in DTYPES:
        x, weights, segment = operands(2, 3, 7, 20, dtype, dtype)
        apart = torch.stack((weights, torch.full_like(weights, 9)), -1)[..., 0]
        check(
            x.transpose(0, 1).contiguous().transpose(0, 1),
            apart,
            segment.transpose(0, 2).contiguous().transpose(0, 2),
            2,
        )
        check(x.expand(2, 3, 20)[:, :1].expand(2, 3, 20), weights, torch.cat([segment, segment], 3)[..., :20], 3)
        check(x.mT.contiguous().mT, weights.mT.contiguous().mT, segment, 6)


@needs_compiler
def test_what_is_not_in_the_segment_is_not_read():
    x, weights, segment = operands(2, 2, 12, 40, torch.float16, torch.float16)
    weights[..., 4] = 0.5
    with use_backend("native"):
        want = merge_step(x, weights, segment, 4)
        got = merge_step(x, weights, segment.masked_fill((weights == 0).unsqueeze(-1), float("nan")), 4)
    assert torch.equal(want, got)


@needs_compiler
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_special_numbers_are_not_hidden(isa, number):
    for dtype in DTYPES:
        x, weights, segment = operands(1, 2, 6, 40, dtype, dtype, n_zero=0)
        segment[0, 1, 3, 7], x[0, 0, 39] = number, number
        with use_backend("reference"):
            want = merge_step(x, weights, segment.clone(), 2)
        with use_backend("native"):
            got = merge_step(x, weights, segment, 2)
        assert (~want.isfinite()).sum() == 2
        assert torch.equal(want.isnan(), got.isnan()) and torch.equal(want.isinf(), got.isinf())


@needs_compiler
def test_threads_do_not_change_the_result():
    """As large as it takes for a second thread to be woken."""
    x, weights, segment = operands(4, 8, 64, 256, torch.bfloat16, torch.bfloat16)
    weights[..., 1] = 0.5
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with use_backend("native"):
                results.append(merge_step(x, weights, segment.clone(), 1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_compiler)])
def test_step_by_step_is_the_parallel_mean(backend):
    """A few hundred steps through the ring, segments of all lengths, against `dmc.merge` over the whole text."""
    B, H, S, D, w = 2, 3, 200, 16, 5
    torch.manual_seed(0)
    x, omega = torch.randn(B, H, S, D), torch.rand(B, H, S) + 2**-7
    alpha = torch.rand(B, H, S) < 0.8
    alpha[..., 0] = False
    want = merge(x, omega, alpha, w)
    segment, weights = torch.zeros(B, H, w, D), torch.zeros(B, H, w)
    with use_backend(backend):
        for t in range(S):
            weights *= alpha[..., t : t + 1]
            weights[..., t % w] = omega[..., t]
            torch.testing.assert_close(merge_step(x[:, :, t], weights, segment, t % w), want[:, :, t])


def test_float64_takes_the_reference():
    x, weights, segment = (t.double() for t in operands(1, 2, 4, 8, torch.float32, torch.float32))
    weights[..., 1] = 1
    assert choose("merge_step", CPU, (x, weights, segment)).backend == "reference"
    assert merge_step(x, weights, segment, 1).dtype == torch.float64


@needs_compiler
def test_what_native_code_cannot_do_is_said():
    x, weights, segment = operands(1, 2, 4, 8, torch.float32, torch.float32)
    with use_backend("native"), pytest.raises(BackendUnavailable, match="weights are torch.float64"):
        merge_step(x, weights.double(), segment, 1)
    with use_backend("native"), pytest.raises(BackendUnavailable, match="not adjacent"):
        merge_step(x, weights, segment.mT.contiguous().mT, 1)


def test_operands_that_do_not_fit_are_refused():
    x, weights, segment = operands(1, 2, 4, 8, torch.float16, torch.float16)
    for bad in ((x, weights[..., :3], segment, 1), (x, weights, segment[..., :7], 1), (x, weights, segment, 4)):
        with pytest.raises(ValueError, match="must be"):
            merge_step(*bad)
    with pytest.raises(ValueError, match="segment is"):
        merge_step(x, weights, segment.bfloat16(), 1)
