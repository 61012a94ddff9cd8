"""The C++ backend against the reference, on every instruction set this CPU has."""

import threading

import pytest
import torch
from rooms import on_levels

from hf_kvcache.kernels import native, use_backend
from hf_kvcache.kernels.dense_attention import dense_attention
from hf_kvcache.kernels.quant_attention import quant_attention
from hf_kvcache.kernels.quant_pack import quant_pack

CPU = torch.device("cpu")
# without a compiler there is nothing to test; a source that does not compile must fail
REASON = native.why_no_compiler()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


# for these ops the two levels above avx512_vnni are avx512_vnni
isa = on_levels("avx512_vbmi2")


def assert_close(name, ref, out, dtype):
    """Relative to the largest number of the reference; NaN and infinities must be in the same places."""
    (ref_out, ref_lse), (got_out, got_lse) = ref, out
    assert got_out.dtype == ref_out.dtype and got_out.shape == ref_out.shape
    assert torch.equal(ref_out.isnan(), got_out.isnan()), f"{name}: NaN"
    assert torch.equal(ref_lse.isnan(), got_lse.isnan()) and torch.equal(ref_lse.isinf(), got_lse.isinf()), (
        f"{name}: lse"
    )
    ref_out, got_out = ref_out.float().nan_to_num(), got_out.float().nan_to_num()
    limit = TOLERANCE[dtype] * max(1.0, ref_out.abs().max().item())
    assert (ref_out - got_out).abs().max() <= limit, f"{name}: output"
    ref_lse, got_lse = (x.nan_to_num(0, 0, 0) for x in (ref_lse, got_lse))
    limit = max(1e-5 if dtype == torch.float32 else 1e-3, 1e-6 * ref_lse.abs().max().item())
    assert (ref_lse - got_lse).abs().max() <= limit, f"{name}: lse"


def both(op, *args, **kwargs):
    with use_backend("reference"):
        ref = op(*args, **kwargs)
    with use_backend("native"):
        return ref, op(*args, **kwargs)


def some_mask(kind, B, Hkv, S, n):
    if kind is None:
        return None
    batch, heads = {"shared": (1, 1), "batch": (B, 1), "heads": (1, Hkv), "full": (B, Hkv)}[kind]
    mask = torch.rand(batch, heads, S, n) > 0.3
    mask[0, 0, 0] = False  # a query that sees nothing
    return mask


def a_view(B, H, n, D, dtype):
    """Rows in a buffer with room for more, as the stores keep them."""
    return torch.randn(B, H, n + 37, D).to(dtype)[:, :, :n]


def queries(B, Hq, S, D, dtype):
    return torch.randn(B, S, Hq, D).to(dtype).transpose(1, 2)


# n, D, G, B, S, mask, softcap
DENSE = [
    (1, 64, 1, 1, 1, None, None),
    (31, 8, 4, 2, 1, "batch", None),
    (63, 80, 7, 1, 3, "shared", 5.0),
    (500, 128, 4, 2, 1, None, None),
    (500, 16, 7, 2, 3, "full", None),
    (63, 96, 1, 2, 3, "heads", None),
    (1300, 64, 4, 2, 3, "batch", 20.0),
    (1300, 256, 2, 1, 1, None, None),
    (700, 128, 4, 1, 64, "shared", None),
    (129, 128, 8, 1, 1, None, None),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", DENSE, ids=lambda c: "n{}-d{}-g{}-b{}-s{}-{}-cap{}".format(*c))
def test_dense(isa, case, dtype):
    n, D, G, B, S, mask, softcap = case
    torch.manual_seed(0)
    k, v = a_view(B, 2, n, D, dtype), a_view(B, 2, n, D, dtype)
    mask = some_mask(mask, B, 2, S, n)
    ref, out = both(dense_attention, queries(B, 2 * G, S, D, dtype), k, v, scaling=D**-0.5, mask=mask, softcap=softcap)
    assert_close("dense", ref, out, dtype)


def packed(B, H, n, D, bits, axis, group_size, bias=3.0):
    """`n` packed rows as views into a larger buffer, with an offset per channel as real keys have."""
    x = torch.randn(B, H, (n + 95) // 32 * 32, D) + bias * torch.randn(D)
    with use_backend("reference"):
        codes, scale, zero = quant_pack(x, bits=bits, axis=axis, group_size=group_size)
    rows = n // 32 if axis == "channel" else n
    return codes[:, :, :n], scale[:, :, :rows], zero[:, :, :rows]


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_spare_rows_are_not_read(axis, backend):
    torch.manual_seed(0)
    keys, values = packed(2, 2, 96, 64, 4, axis, 32), packed(2, 2, 96, 64, 4, "token", 32)
    q, tail = queries(2, 4, 1, 64, torch.float32), torch.randn(2, 2, 5, 64)
    form = {"bits": (4, 4), "key_axis": axis, "scaling": 0.125}
    cut_keys, cut_values = ([x[:, :, : x.shape[2] * 64 // 96] for x in side] for side in (keys, values))
    with use_backend(backend):
        out, lse = quant_attention(q, keys, values, tail, tail, n_packed=64, **form)
        cut_out, cut_lse = quant_attention(q, cut_keys, cut_values, tail, tail, **form)
    assert torch.equal(out, cut_out) and torch.equal(lse, cut_lse)


# bits, key axis, D, groups of a value row, packed rows, tail, G, S, B, mask, softcap
QUANT = [
    ((4, 4), "channel", 128, 1, 544, 31, 4, 1, 1, None, None),
    ((4, 4), "channel", 128, 2, 1376, 0, 4, 1, 2, "batch", None),
    ((4, 4), "channel", 128, 4, 32, 63, 7, 3, 1, "full", 5.0),
    ((4, 4), "channel", 64, 1, 544, 1, 2, 1, 2, None, None),
    ((8, 8), "channel", 128, 2, 544, 0, 4, 3, 1, "shared", None),
    ((8, 8), "channel", 80, 1, 160, 5, 1, 1, 2, "heads", None),
    ((8, 4), "channel", 96, 1, 544, 31, 7, 1, 1, None, None),
    ((2, 2), "channel", 128, 4, 544, 31, 4, 1, 1, None, None),
    ((2, 2), "channel", 64, 1, 1376, 0, 1, 3, 1, "full", None),
    ((4, 2), "channel", 256, 2, 96, 500, 4, 1, 1, "batch", None),
    ((2, 8), "channel", 256, 1, 160, 0, 7, 1, 1, None, 20.0),
    ((4, 4), "channel", 16, 1, 160, 31, 4, 1, 2, None, None),
    ((3, 3), "channel", 64, 2, 160, 31, 4, 1, 2, "batch", None),
    ((3, 4), "token", 128, 1, 63, 1, 4, 1, 1, None, None),
    ((4, 4), "token", 128, 1, 500, 31, 4, 3, 1, "shared", None),
    ((8, 8), "token", 64, 1, 31, 0, 4, 1, 2, None, None),
    ((2, 4), "token", 128, 1, 63, 0, 1, 1, 1, "full", None),
    ((4, 8), "token", 64, 2, 129, 7, 2, 1, 1, None, None),
    ((4, 4), "channel", 128, 16, 160, 0, 4, 1, 1, None, None),
    ((4, 4), "channel", 128, 1, 0, 63, 4, 1, 1, None, None),
    ((4, 4), "channel", 128, 1, 544, 31, 4, 40, 1, "shared", None),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", QUANT, ids=lambda c: "{}-{}-d{}-v{}-n{}+{}-g{}-s{}-b{}-{}-cap{}".format(*c))
def test_quant(isa, case, dtype):
    bits, axis, D, groups, n, m, G, S, B, mask, softcap = case
    torch.manual_seed(0)
    keys = packed(B, 2, n, D, bits[0], axis, 32 if axis == "channel" else D)
    values = packed(B, 2, n, D, bits[1], "token", D // groups, bias=0.0)
    tail = a_view(B, 2, m, D, dtype), a_view(B, 2, m, D, dtype)
    options = {"bits": bits, "key_axis": axis, "scaling": D**-0.5, "softcap": softcap}
    mask = some_mask(mask, B, 2, S, n + m)
    ref, out = both(quant_attention, queries(B, 2 * G, S, D, dtype), keys, values, *tail, mask=mask, **options)
    assert_close("quant", ref, out, dtype)


def test_keys_per_token_in_groups(isa):
    """A format only the decoding path takes."""
    torch.manual_seed(0)
    keys, values = packed(1, 2, 100, 128, 4, "token", 32), packed(1, 2, 100, 128, 4, "token", 64)
    q = queries(1, 8, 1, 128, torch.float32)
    ref, out = both(quant_attention, q, keys, values, bits=(4, 4), key_axis="token", scaling=0.1)
    assert_close("groups", ref, out, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_huge_key_bias(isa, dtype):
    """A channel of 300 (Qwen2.5) costs resolution of that channel, not accuracy of the arithmetic."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 320, 128)
    x[..., 5] += 300
    keys = quant_pack(x, bits=4, axis="channel", group_size=32)
    values = packed(1, 2, 320, 128, 4, "token", 64, bias=0.0)
    q = queries(1, 8, 1, 128, dtype)
    ref, out = both(quant_attention, q, keys, values, bits=(4, 4), key_axis="channel", scaling=128**-0.5)
    assert_close("bias", ref, out, dtype)


@pytest.mark.parametrize("where", ["k", "v"])
def test_nan_is_not_hidden(isa, where):
    torch.manual_seed(0)
    k, v, q = torch.randn(1, 2, 200, 64), torch.randn(1, 2, 200, 64), torch.randn(1, 4, 1, 64)
    {"k": k, "v": v}[where][0, 1, 70, 3] = float("nan")
    ref, out = both(dense_attention, q, k, v, scaling=0.1)
    assert ref[0].isnan().any()
    assert_close("dense", ref, out, torch.float32)
    with use_backend("reference"):
        keys = quant_pack(k[:, :, :192], bits=4, axis="channel", group_size=32)
        values = quant_pack(v[:, :, :192], bits=4, axis="token", group_size=64)
    ref, out = both(quant_attention, q, keys, values, bits=(4, 4), key_axis="channel", scaling=0.1)
    assert ref[0].isnan().any()
    assert_close("quant", ref, out, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_pack_is_the_reference_bit_for_bit(isa, bits, dtype):
    torch.manual_seed(0)
    for D in (16, 48, 80, 128):
        x = (10 * torch.randn(2, 2, 103, D) * torch.rand(D) + 100 * torch.randn(D)).to(dtype)[:, :, :96]
        x[0, 0, :32] = 1.5  # constant groups
        x[0, 1, 40] *= 1e-3
        x[1, 0, 3, 5], x[1, 0, 70, 7], x[1, 1, 2, 9] = float("nan"), float("inf"), -float("inf")
        for axis, group in (("channel", 32), ("token", D), ("token", D // 2)):
            ref, out = both(quant_pack, x, bits=bits, axis=axis, group_size=group)
            for name, a, b in zip(("codes", "scale", "zero"), ref, out):
                assert torch.equal(a.isnan(), b.isnan()) if a.is_floating_point() else True
                assert torch.equal(a.nan_to_num(-7), b.nan_to_num(-7)), f"{name}, D={D}, {axis}, {group}"


def test_pack_rounds_like_a_division():
    """The quotient is computed by multiplication and correction: many numbers, wide range of scales."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, 2048, 128) * 10.0 ** torch.randint(-4, 4, (128,)).float()
    for bits in (8, 4):
        ref, out = both(quant_pack, x, bits=bits, axis="channel", group_size=32)
        for a, b in zip(ref, out):
            assert torch.equal(a, b)


def test_threads_do_not_change_the_result():
    torch.manual_seed(0)
    q, k, v = queries(1, 8, 1, 128, torch.bfloat16), *(a_view(1, 2, 9000, 128, torch.bfloat16) for _ in range(2))
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with use_backend("native"):
                results.append(dense_attention(q, k, v, scaling=0.1)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_several_python_threads_at_once():
    torch.manual_seed(0)
    keys, values = packed(1, 2, 2048, 128, 4, "channel", 32), packed(1, 2, 2048, 128, 4, "token", 64)
    jobs = [queries(1, 8, 1, 128, torch.bfloat16) for _ in range(4)]
    options = {"bits": (4, 4), "key_axis": "channel", "scaling": 0.1}
    want = [quant_attention(q, keys, values, **options)[0] for q in jobs]
    wrong = []

    def work(i):
        for _ in range(20):
            if not torch.equal(quant_attention(jobs[i], keys, values, **options)[0], want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_mask_without_rows_contiguous():
    torch.manual_seed(0)
    q, k, v = (
        queries(1, 4, 2, 64, torch.float32),
        a_view(1, 2, 100, 64, torch.float32),
        a_view(1, 2, 100, 64, torch.float32),
    )
    mask = (torch.rand(1, 1, 100, 2) > 0.3).transpose(2, 3)
    ref, out = both(dense_attention, q, k, v, scaling=0.1, mask=mask)
    assert_close("mask", ref, out, torch.float32)
