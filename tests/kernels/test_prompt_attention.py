"""Attention of prompts: the reference against the formula, the C++ backend against the reference on every level."""

import pytest
import torch
from rooms import on_levels

from hf_kvcache.kernels import native, use_backend
from hf_kvcache.kernels.merge_states import merge_two
from hf_kvcache.kernels.prompt_attention import prompt_attention

REASON = native.why_no_compiler()
needs_compiler = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


# the levels between are avx512 here
isa = on_levels("avx512_vbmi2", "avx512_vnni")


def formula(q, k, v, scaling, is_real=None, softcap=None):
    """softmax(q k^T) v over the rows up to its own, all at once in float64."""
    S, N, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.mT * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    sees = torch.ones(S, N, dtype=torch.bool).tril(N - S)[None, None]
    if is_real is not None:
        sees = sees & is_real[:, None, None]
    scores = scores.masked_fill(~sees, -torch.inf)
    return scores.softmax(-1).nan_to_num() @ v, scores.logsumexp(-1)


# S, N, D, Dv, B, Hkv, query heads of each, padding, softcap
CASES = [
    (1, 1, 64, 64, 1, 1, 1, None, None),
    (33, 33, 64, 64, 2, 3, 3, "left", None),
    (129, 500, 40, 24, 1, 2, 4, None, 5.0),
    (7, 300, 128, 128, 2, 2, 1, "left", None),
    (300, 300, 16, 16, 1, 1, 8, None, None),
    (257, 1000, 80, 96, 2, 1, 2, "anywhere", None),
    (49, 256, 256, 256, 1, 1, 2, None, None),
    (64, 641, 33, 47, 2, 2, 2, "anywhere", 20.0),
    (96, 96, 192, 128, 1, 2, 1, None, None),
]


def operands(case, dtype):
    S, N, D, Dv, B, Hkv, group, padding, softcap = case
    torch.manual_seed(0)
    q = torch.randn(B, S, Hkv * group, D).to(dtype).transpose(1, 2)
    # rows in a buffer with room for more, as stores keep them
    k, v = (torch.randn(B, Hkv, N + 5, width).to(dtype)[:, :, :N] for width in (D, Dv))
    is_real = None
    if padding == "left":
        is_real = torch.arange(N) >= torch.tensor([0, N // 2])[:B, None]
    elif padding == "anywhere":
        is_real = torch.rand(B, N) > 0.3
        # queries that see nothing, and a block of rows that nobody sees
        is_real[0, :400] = False
    return (q, k, v), {"scaling": D**-0.5, "is_real": is_real, "softcap": softcap}


def assert_close(got, expected, dtype):
    (out, lse), (right, right_lse) = got, expected
    assert out.dtype == dtype and out.shape == right.shape and lse.dtype == torch.float32
    assert torch.equal(lse.isinf(), right_lse.isinf())
    assert torch.allclose(out.double(), right.double(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.allclose(lse.nan_to_num(neginf=0).double(), right_lse.nan_to_num(neginf=0).double(), atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_the_formula(case, dtype):
    args, options = operands(case, dtype)
    with use_backend("reference"):
        assert_close(prompt_attention(*args, **options), formula(*args, **options), dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_native(isa, case, dtype):
    args, options = operands(case, dtype)
    with use_backend("native"):
        assert_close(prompt_attention(*args, **options), formula(*args, **options), dtype)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_rows_are_merged(dtype, backend):
    """A block says which row is the first query's, wherever that is: all may be older, and some queries see nothing."""
    (q, k, v), options = operands(CASES[5], dtype)
    S, N = q.shape[2], k.shape[2]
    with use_backend(backend):
        found, ends = None, [0, 300, 800, 990, N]
        for start, stop in zip(ends, ends[1:]):
            own = options | {"is_real": options["is_real"][:, start:stop], "own": N - S - start}
            part = prompt_attention(q, k[:, :, start:stop], v[:, :, start:stop], **own)
            found = part if found is None else merge_two(found, part)
    assert_close(found, formula(q, k, v, **options), dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_other_rows_of_a_batch_change_nothing(dtype):
    args, options = operands(CASES[5], dtype)
    with use_backend("native"):
        whole = prompt_attention(*args, **options)
        n_threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            again = prompt_attention(*args, **options)
        finally:
            torch.set_num_threads(n_threads)
        alone = prompt_attention(*(x[1:] for x in args), **options | {"is_real": options["is_real"][1:]})
    assert all(torch.equal(a, b) for a, b in zip(whole, again))
    assert all(torch.equal(a[1:], b) for a, b in zip(whole, alone))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_is_seen_by_those_who_see_its_row(dtype):
    args, options = operands(CASES[1], dtype)
    q, k, v = (x.clone() for x in args)
    hidden, seen = 3, 25  # of the second row of the batch, whose first 16 tokens are padding
    k[1, :, hidden] = k[1, :, seen] = torch.nan
    with use_backend("native"):
        out, _ = prompt_attention(q, k, v, **options)
    assert not out[0].isnan().any() and not out[1, :, :seen].isnan().any() and out[1, :, seen:].isnan().all()


def test_bad_operands():
    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 8, 16)
    with pytest.raises(ValueError, match="9 queries are more than 8 tokens"):
        prompt_attention(q, k, k, scaling=1.0)
    with pytest.raises(ValueError, match=r"must be bool \[2, 8\]"):
        prompt_attention(q[:, :, :8], k, k, scaling=1.0, is_real=torch.ones(2, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="dtypes differ"):
        prompt_attention(q[:, :, :8].half(), k, k, scaling=1.0)
