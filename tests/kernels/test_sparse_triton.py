"""Triton kernels of sparse rows against the reference; where they run is said in `test_triton.py`."""

from functools import cache

import pytest
import torch
from rooms import telling
from test_triton import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    LOW,
    LSE,
    ON_GPU,
    OUT,
    assert_close,
    in_larger_buffer,
    random_case,
    run_in_the_interpreter,
    runs_kernels,
    visible,
)

from hf_kvcache.kernels import BackendUnavailable, use_backend
from hf_kvcache.kernels.quant_pack.reference import quant_pack
from hf_kvcache.kernels.sparse_attention import SparseRows, sparse_attention
from hf_kvcache.kernels.sparse_attention import reference as attention
from hf_kvcache.kernels.sparse_pack import reference as pack
from hf_kvcache.kernels.sparse_pack import sparse_pack


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests below run here directly")
def test_in_the_interpreter(pytestconfig):
    run_in_the_interpreter(__file__, config=pytestconfig)


def sparse_rows(x, keep=None, bits=None, groups=1, group_size=None, layout="bitmap"):
    """One side as stores hand it out: views of larger buffers; `keep=None` keeps all channels in order."""
    values, places = (x, None) if keep is None else pack.sparse_pack(x, keep=keep, layout=layout, group_size=group_size)
    scale = zero = None
    if bits is not None:
        values, scale, zero = quant_pack(values, bits=bits, axis="token", group_size=values.shape[3] // groups)
    parts = (None if part is None else in_larger_buffer(part, 13) for part in (values, places, scale, zero))
    values, places, scale, zero = parts
    return SparseRows(values, places, layout, scale, zero, bits, group_size)


def two_of_four(D):
    return {"keep": D // 2, "group_size": 4}


# name: batch, kv heads, query heads per kv head, queries, head size, packed rows, tail rows,
#       keys, values, mask, softcap
SPARSE = {
    "one-row": (1, 1, 1, 1, 128, 1, 0, {"keep": 40}, {"keep": 40}, None, None),
    "gqa4-500": (1, 2, 4, 1, 128, 500, 31, {"keep": 64}, {"keep": 40}, None, None),
    "gqa7-s3-mask": (2, 1, 7, 3, 80, 63, 5, {"keep": 24}, {"keep": 40}, "each", None),
    "batch-mask-softcap": (2, 2, 4, 1, 64, 31, 1, {"keep": 32}, {"keep": 20}, "batch", 20.0),
    "96": (1, 1, 4, 1, 96, 70, 0, {"keep": 28}, {"keep": 48}, "all", None),
    "256": (1, 1, 4, 1, 256, 63, 3, {"keep": 128}, {"keep": 80}, None, None),
    "16": (1, 2, 1, 2, 16, 130, 5, {"keep": 5}, {"keep": 8}, "head", None),
    "odd-head-size": (1, 1, 2, 1, 20, 40, 0, {"keep": 7}, {}, None, None),
    "only-keys": (1, 1, 4, 1, 128, 63, 0, {"keep": 64}, {}, None, None),
    "everything-kept": (1, 1, 4, 1, 64, 31, 0, {"keep": 64}, {"keep": 64}, None, None),
    "only-tail": (1, 1, 4, 1, 64, 0, 63, {"keep": 32}, {"keep": 32}, None, None),
    "nothing": (1, 1, 4, 1, 64, 0, 0, {"keep": 32}, {"keep": 32}, None, None),
    "pattern-64": (1, 1, 4, 1, 64, 70, 5, two_of_four(64), two_of_four(64), None, None),
    "pattern-80-mask": (2, 1, 7, 3, 80, 63, 0, two_of_four(80), two_of_four(80), "each", None),
    "pattern-128": (1, 2, 4, 1, 128, 500, 31, two_of_four(128), two_of_four(128), None, None),
    "pattern-256-softcap": (1, 1, 1, 1, 256, 31, 0, two_of_four(256), two_of_four(256), None, 20.0),
    "pattern-keys-bitmap-values": (1, 1, 4, 1, 96, 33, 0, two_of_four(96), {"keep": 32}, None, None),
    "4bit": (1, 2, 4, 1, 128, 130, 31, {"keep": 40, "bits": 4}, {"keep": 40, "bits": 4}, None, None),
    "8bit-2bit-groups": (
        2, 1, 7, 3, 64, 63, 5, {"keep": 20, "bits": 8, "groups": 2}, {"keep": 32, "bits": 2, "groups": 4}, "each", None,
    ),
    "4bit-keys-full-values": (1, 1, 4, 1, 80, 31, 1, {"keep": 24, "bits": 4, "groups": 3}, {"keep": 40}, None, None),
    "4bit-dense-values": (1, 1, 4, 1, 128, 31, 1, {"keep": 64, "bits": 4}, {"bits": 8, "groups": 2}, None, None),
    "4bit-256": (1, 1, 4, 1, 256, 31, 0, {"keep": 80, "bits": 4}, {"keep": 64, "bits": 2}, None, None),
}  # fmt: skip


# index rows and what the faster kernel takes of the others
GLUON = {
    "bitmap-gqa4-500": (1, 2, 4, 1, 128, 500, 31, {"keep": 64}, {"keep": 40}, None, None),
    "bitmap-80-mask": (2, 1, 7, 3, 80, 63, 5, {"keep": 24}, {"keep": 40}, "each", None),
    "bitmap-64-softcap": (2, 2, 4, 1, 64, 31, 1, {"keep": 32}, {"keep": 20}, "batch", 20.0),
    "bitmap-everything-kept": (1, 1, 4, 1, 128, 1, 0, {"keep": 128}, {"keep": 1}, None, None),
    "pattern-128": (1, 1, 4, 1, 128, 130, 31, two_of_four(128), two_of_four(128), None, None),
    "pattern-80-mask": (2, 1, 7, 3, 80, 63, 0, two_of_four(80), two_of_four(80), "each", None),
    "pattern-keys-bitmap-values": (1, 1, 4, 1, 96, 33, 0, two_of_four(96), {"keep": 32}, None, None),
    "index-gqa4-500": (
        1, 2, 4, 1, 128, 500, 31, {"keep": 40, "layout": "index"}, {"keep": 64, "layout": "index"}, None, None,
    ),
    "index-80-mask": (
        2, 1, 7, 3, 80, 63, 5, {"keep": 24, "layout": "index"}, {"keep": 27, "layout": "index"}, "each", None,
    ),
    "index-256": (
        1, 1, 1, 1, 256, 31, 0, {"keep": 40, "layout": "index"}, {"keep": 20, "layout": "index"}, None, None,
    ),
    "index-keys-bitmap-values": (1, 1, 4, 1, 64, 70, 0, {"keep": 20, "layout": "index"}, {"keep": 32}, "all", None),
}  # fmt: skip


def sparse_case(case, dtype):
    B, Hkv, G, S, D, N, M, k_format, v_format, kind, softcap = case
    q, k, v = random_case(B, Hkv, G, S, D, N, dtype)
    _, tail_k, tail_v = random_case(B, Hkv, G, S, D, M, dtype)
    keys, values = sparse_rows(k, **k_format), sparse_rows(v, **v_format)
    tail = (in_larger_buffer(tail_k, 3), in_larger_buffer(tail_v, 3)) if M else (None, None)
    arguments = {"scaling": D**-0.5, "mask": visible(B, Hkv, S, N + M, kind), "softcap": softcap}
    return (q, keys, values, *tail), arguments


def assert_like_the_reference(got, operands, arguments):
    (out, lse), (q, keys, values, *tail) = got, operands
    tail = (x if x is None else x.double() for x in tail)
    expected_out, expected_lse = attention.sparse_attention(q.double(), keys, values, *tail, **arguments)
    assert out.shape == q.shape and out.dtype == q.dtype and lse.dtype == torch.float32
    assert_close("out", expected_out, out, OUT[q.dtype])
    assert_close("lse", expected_lse, lse, LSE[q.dtype])


@runs_kernels
@pytest.mark.parametrize("dtype", telling(LOW, "fp16"))
@pytest.mark.parametrize("case", telling(SPARSE, "gqa7-s3-mask", "pattern-64", "8bit-2bit-groups"))
def test_sparse_attention(case, dtype, monkeypatch):
    from hf_kvcache.kernels.sparse_attention import triton_kernel

    monkeypatch.setattr(triton_kernel, "_gluon", lambda: (None, "it has tests of its own"))
    operands, arguments = sparse_case(SPARSE[case], DTYPES[dtype])
    with use_backend("triton"):
        got = sparse_attention(*operands, **arguments)
    assert_like_the_reference(got, operands, arguments)


@runs_kernels
@pytest.mark.parametrize("dtype", ["fp16", "bf16"] if ON_GPU else ["fp16"])
@pytest.mark.parametrize("case", telling(GLUON, "bitmap-64-softcap", "index-keys-bitmap-values"))
def test_sparse_attention_by_gluon(case, dtype, monkeypatch):
    from hf_kvcache.kernels.sparse_attention import triton_kernel

    operands, arguments = sparse_case(GLUON[case], DTYPES[dtype])
    if INTERPRETED:
        stand_in = gluon_kernel_in_the_interpreter()
        monkeypatch.setattr(triton_kernel, "_gluon", lambda: (stand_in, None))
    # refused kernels leave the call to others, which would hide it
    if why_not := triton_kernel.gluon_obstacle(*operands[:3]):
        assert "has no scatter" in why_not, why_not
        pytest.skip(why_not)
    with use_backend("triton"):
        got = sparse_attention(*operands, **arguments)
    assert_like_the_reference(got, operands, arguments)


@cache
def gluon_kernel_in_the_interpreter():
    import gluon_interpreter

    return gluon_interpreter.load("hf_kvcache.kernels.sparse_attention.gluon_kernel")


@pytest.mark.skipif(not INTERPRETED, reason="needs the stand-in for Gluon")
def test_a_gluon_kernel_that_is_wrong_is_refused(monkeypatch, unsaid):
    from hf_kvcache.kernels.sparse_attention import triton_kernel

    module = gluon_kernel_in_the_interpreter()
    monkeypatch.setattr(triton_kernel, "_gluon", lambda: (module, None))
    monkeypatch.setattr(module, "_verdicts", {})
    (q, keys, values, *_), arguments = sparse_case(GLUON["index-keys-bitmap-values"], torch.float16)
    assert triton_kernel.gluon_obstacle(q, keys, values) is None
    module._verdicts.clear()
    right = module.attend
    monkeypatch.setattr(module, "attend", lambda *args, scaling, **kw: right(*args, scaling=2 * scaling, **kw))
    with pytest.warns(UserWarning, match="differs from the reference"):
        assert "differs" in triton_kernel.obstacle(q, keys, values)
    # said once
    assert "differs" in triton_kernel.obstacle(q, keys, values)


def rows_with_ties(n, D):
    """Random rows, and rows of zeros, of one value, of few values, of infinities and of NaN."""
    torch.manual_seed(D)
    x = torch.randn(2, 2, n, D, device=DEVICE)
    x[0, 0, 0], x[0, 0, 1], x[0, 0, 2] = 0, 2.5, -0.0
    x[0, 1] = x[0, 1].round()
    x[1, 0, 2, 3], x[1, 0, 2, 5], x[1, 0, 2, 1] = float("nan"), float("inf"), float("-inf")
    x[1, 1, 0] = float("nan")
    x[1, 1, 1] = float("-inf")
    x[1, 1, 1, -1] = float("nan")
    return x


# head size, kept, group size, layout
PACK = [
    (64, 20, None, "bitmap"), (80, 24, None, "index"), (80, 40, 4, "bitmap"), (96, 32, None, "bitmap"),
    (96, 48, 32, "index"), (128, 40, None, "bitmap"), (128, 64, 4, "bitmap"), (128, 128, None, "index"),
    (256, 80, None, "index"), (256, 128, 4, "bitmap"), (20, 7, None, "bitmap"), (12, 6, 4, "bitmap"),
]  # fmt: skip


@runs_kernels
@pytest.mark.parametrize("dtype", telling(DTYPES, "fp16"))
@pytest.mark.parametrize(("D", "keep", "group_size", "layout"), PACK, ids=lambda x: str(x))
def test_sparse_pack_equals_the_reference_bit_by_bit(D, keep, group_size, layout, dtype):
    x = in_larger_buffer(rows_with_ties(7, D).to(DTYPES[dtype]), 3)
    assert_packed_alike(x, keep=keep, layout=layout, group_size=group_size)


@runs_kernels
@pytest.mark.parametrize("n", telling([1, 31, 500], 31))
def test_sparse_pack_of_odd_lengths(n):
    assert_packed_alike(torch.randn(1, 2, n, 128, device=DEVICE).half(), keep=40, layout="bitmap")


@runs_kernels
def test_sparse_pack_by_another_importance():
    x, importance = torch.randn(2, 2, 31, 2, 64, device=DEVICE).transpose(2, 3)
    assert_packed_alike(x.half(), keep=20, layout="bitmap", importance=importance)
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="float64"):
        sparse_pack(x, keep=4, layout="bitmap", importance=x.double())


def assert_packed_alike(x, **arguments):
    with use_backend("triton"):
        got = sparse_pack(x, **arguments)
    expected = pack.sparse_pack(x, **arguments)
    for name, a, b in zip(("values", "places"), expected, got):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), name


@runs_kernels
def test_what_the_kernels_cannot_do_is_said():
    q, k, v = random_case(1, 1, 1, 1, 64, 8, torch.float32)
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="3 bits"):
        sparse_attention(q, sparse_rows(k, keep=32, bits=3), sparse_rows(v, keep=32), scaling=1.0)
    if INTERPRETED:
        rows = sparse_rows(k, keep=32, layout="index")
        with use_backend("triton"), pytest.raises(BackendUnavailable, match="need Gluon"):
            sparse_attention(q, rows, rows, scaling=1.0)
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="not a power of two"):
        sparse_pack(k[..., :60], keep=10, layout="bitmap", group_size=6)
