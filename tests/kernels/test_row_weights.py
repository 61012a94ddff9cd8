"""What rows get of the attention of queries: the reference against a softmax by hand, and C++ against the reference."""

import pytest
import torch
from rooms import on_levels

from hf_kvcache.kernels import Choice, choose, native, use_backend
from hf_kvcache.kernels.row_weights import REDUCTIONS, reference, row_weights

REASON = native.why_no_compiler()
# without a compiler there is nothing to test; a source that does not compile must fail
needs_compiler = pytest.mark.skipif(REASON is not None, reason=str(REASON))
BACKENDS = ["reference", pytest.param("native", marks=needs_compiler)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# the levels above avx512 are avx512 here
isa = on_levels("avx512_vbmi2", "avx512_vnni", "avx512")


def operands(B, Hkv, G, S, N, D, dtype=torch.float32):
    """Queries as a projection leaves them, keys in a buffer with room for more."""
    q, k = torch.randn(B, S, Hkv * G, D).to(dtype).transpose(1, 2), torch.randn(B, Hkv, N + 37, D).to(dtype)[:, :, :N]
    return q, k


def whole(B, Hkv, N, n_padding=None):
    """Positions of rows none of which has gone, `n_padding` of every row of the batch in front."""
    positions = torch.arange(N, dtype=torch.int32).expand(B, Hkv, N)
    return positions if n_padding is None else positions.masked_fill(positions < n_padding.view(B, 1, 1), -1)


def evicted(B, Hkv, N, tokens_seen):
    """Positions in no order, other ones for every head, with gaps, and a fifth of them padding."""
    order = torch.rand(B, Hkv, tokens_seen).argsort(-1)[..., :N]
    return order.masked_fill(torch.rand(B, Hkv, N) < 0.2, -1)


def assert_close(expected, got, limit=2e-5):
    """Relative to the largest number of the reference."""
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert (expected - got).abs().max() <= limit * expected.max()


def both(*args, **kwargs):
    expected = reference.row_weights(*args, **kwargs)
    with use_backend("native"):
        return expected, row_weights(*args, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_softmax_by_hand(backend, reduce):
    """One query and one row at a time, in float64."""
    torch.manual_seed(0)
    B, Hkv, G, S, N, D = 2, 2, 3, 5, 9, 8
    (q, k), positions, first = operands(B, Hkv, G, S, N, D), evicted(B, Hkv, N, 12), 6
    positions[0, 0] = 11  # nobody but nobody sees these
    is_real = torch.rand(B, Hkv, S) < 0.7
    expected = torch.zeros(B, Hkv, N, dtype=torch.float64)
    for b, h, g, i in torch.cartesian_prod(*map(torch.arange, (B, Hkv, G, S))).tolist():
        seen = [j for j in range(N) if 0 <= positions[b, h, j] <= first + i]
        if not seen or not is_real[b, h, i]:
            continue
        scores = (k[b, h, seen].double() @ q[b, h * G + g, i].double()) * 0.3
        weights = (5 * (scores / 5).tanh()).exp()
        for j, weight in zip(seen, weights / weights.sum(), strict=True):
            now = expected[b, h, j]
            expected[b, h, j] = now + weight / G if reduce == "sum" else max(now, weight)
    with use_backend(backend):
        got = row_weights(q, k, positions, first, scaling=0.3, softcap=5.0, q_is_real=is_real, reduce=reduce)
    assert not expected[0, 0].any() and expected[0, 1].any()
    assert_close(expected.float(), got, 1e-6)


# B, Hkv, G, S, N, D, first
SIZES = [
    (1, 1, 1, 1, 1, 16, 0),
    (2, 2, 3, 1, 129, 64, 128),
    (1, 2, 8, 7, 33, 40, 26),
    (2, 3, 3, 129, 129, 64, 0),
    (1, 1, 3, 33, 500, 80, 467),
    (3, 2, 1, 65, 65, 96, 0),
    (1, 2, 4, 40, 500, 128, 460),
    (1, 1, 2, 9, 77, 256, 68),
    (1, 3, 3, 500, 500, 20, 0),
    (1, 1, 2, 64, 5000, 64, 4936),
]


@needs_compiler
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "b{}-h{}-g{}-s{}-n{}-d{}-first{}".format(*s))
def test_native_is_the_reference(isa, size):
    B, Hkv, G, S, N, D, first = size
    torch.manual_seed(N)
    n_padding = torch.arange(B) * 7  # queries that stand before them are no tokens
    is_real = (torch.arange(first, first + S) >= n_padding.view(B, 1, 1)).contiguous()
    rows = {"whole": whole(B, Hkv, N, n_padding), "evicted": evicted(B, Hkv, N, first + S)}
    for dtype in DTYPES:
        q, k = operands(B, Hkv, G, S, N, D, dtype)
        for positions in rows.values():
            for reduce, softcap in (("sum", None), ("max", 5.0)):
                options = {"scaling": D**-0.5, "softcap": softcap, "q_is_real": is_real, "reduce": reduce}
                assert_close(*both(q, k, positions, first, **options))


@needs_compiler
def test_queries_that_see_nothing_give_nothing():
    torch.manual_seed(0)
    q, k = operands(1, 2, 3, 40, 70, 16)
    positions = torch.arange(30, 100).expand(1, 2, 70)  # the first 30 queries stand before all rows
    for reduce in REDUCTIONS:
        expected, got = both(q, k, positions, 0, scaling=0.25, reduce=reduce)
        assert_close(expected, got)
        assert not got[..., 10:].any() and got[..., :10].all()
    assert both(q, k, positions, 0, scaling=0.25)[1].sum(-1).allclose(torch.full((1, 2), 10.0))
    for nothing in (torch.full_like(positions, -1), positions + 100):
        assert not torch.stack(both(q, k, nothing, 0, scaling=0.25)).any()


@needs_compiler
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_no_queries_and_no_rows(reduce):
    q, k = operands(2, 2, 3, 4, 5, 16)
    for ref, got in (
        both(q[:, :, :0], k, whole(2, 2, 5), 0, scaling=1.0, reduce=reduce),
        both(q, k[:, :, :0], whole(2, 2, 0), 0, scaling=1.0, reduce=reduce),
    ):
        assert torch.equal(ref, got) and ref.dtype == got.dtype


@needs_compiler
def test_strides_dtypes_and_extreme_scores():
    torch.manual_seed(0)
    q, k = operands(2, 2, 2, 9, 70, 48)
    positions = evicted(2, 2, 90, 90)[..., ::2].int()
    k = k[:, :, :45]
    apart = k.mT.contiguous().mT
    assert apart.stride(3) != 1
    expected, got = both(q, k, positions.contiguous(), 80, scaling=0.1)
    assert_close(expected, got)
    for other in ((q, apart), (q.mT.contiguous().mT, k), (q.flip(0).flip(0), k)):
        assert torch.equal(both(*other, positions, 80, scaling=0.1)[1], got)
    # each side has a type of its own
    assert_close(*both(q, k.bfloat16(), positions, 80, scaling=0.1))
    assert_close(*both(q.half(), k, positions.long(), 80, scaling=0.1))
    # scores of some thousands: one row takes all
    assert_close(*both(q, k, positions, 80, scaling=300.0, reduce="max"))


@needs_compiler
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("where", ["q", "k"])
def test_nan_is_not_hidden(where, reduce):
    torch.manual_seed(0)
    q, k = operands(1, 2, 3, 20, 200, 64)
    {"q": q, "k": k}[where][0, 0, 3, 5] = float("nan")
    expected, got = both(q, k, whole(1, 2, 200), 180, scaling=0.1, reduce=reduce)
    assert expected[0, 0, :180].isnan().all() and got[0, 0, :180].isnan().all()
    assert_close(expected[:, 1], got[:, 1])


@needs_compiler
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_threads_do_not_change_the_result(reduce):
    torch.manual_seed(0)
    q, k = operands(2, 3, 3, 300, 300, 64, torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with use_backend("native"):
                results.append(row_weights(q, k, whole(2, 3, 300), 0, scaling=0.1, reduce=reduce))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_compiler
def test_more_heads_than_are_packed_at_a_time():
    torch.manual_seed(0)
    B, Hkv, N, D = 3, 3, 5000, 128
    assert B * Hkv * N * D > 1 << 22
    q, k = operands(B, Hkv, 1, 2, N, D, torch.bfloat16)
    assert_close(*both(q, k, evicted(B, Hkv, N, 5100), 5098, scaling=0.1))


def test_the_largest_weight_is_not_the_mean_of_heads():
    q, k = torch.tensor([[[[9.0]], [[-9.0]]]]), torch.tensor([[[[1.0], [-1.0]]]])
    for reduce, expected in (("sum", 0.5), ("max", 1.0)):
        with use_backend("reference"):
            got = row_weights(q, k, torch.zeros(1, 1, 2, dtype=torch.int32), 0, scaling=1.0, reduce=reduce)
        assert got.allclose(torch.full((1, 1, 2), expected), atol=1e-6)


@needs_compiler
def test_gradients_float64_and_gpus_are_for_the_reference():
    q, k = operands(1, 1, 2, 3, 5, 8)
    for sides in ((q, k), (q.half(), k.bfloat16())):
        assert choose("row_weights", q.device, sides).backend == "native"
    for sides, reason in (
        ((q.double(), k), "float64"),
        ((q, k.double()), "float64"),
        ((q.clone().requires_grad_(), k), "grad"),
    ):
        choice = choose("row_weights", q.device, sides)
        assert choice.backend == "reference" and reason in choice.reason
        assert row_weights(*sides, whole(1, 1, 5), 4, scaling=1.0).dtype == torch.float32
    assert choose("row_weights", torch.device("cuda")) == Choice("reference", "there is no triton kernel of this op")


def test_operands_that_do_not_fit_are_refused():
    (q, k), positions = operands(2, 2, 3, 4, 5, 8), whole(2, 2, 5)
    for bad in ((q[..., :7], k), (q[:, :5], k), (q[:1], k), (q[0], k)):
        with pytest.raises(ValueError, match="Hkv, N, D"):
            row_weights(*bad, positions, 0, scaling=1.0)
    for bad in (positions[:, :1], positions[..., :4], positions.float()):
        with pytest.raises(ValueError, match="positions"):
            row_weights(q, k, bad, 0, scaling=1.0)
    is_real = torch.ones(2, 2, 4, dtype=torch.bool)
    for bad in (is_real[:1], is_real[..., :3], is_real.int(), is_real[:, 0]):
        with pytest.raises(ValueError, match="q_is_real"):
            row_weights(q, k, positions, 0, scaling=1.0, q_is_real=bad)
    with pytest.raises(ValueError, match="'mean' is not one of sum, max"):
        row_weights(q, k, positions, 0, scaling=1.0, reduce="mean")
