"""The C++ backend of the sparse ops against the reference, on every instruction set this CPU has."""

import pytest
import torch
from rooms import on_levels
from test_native import CPU, DTYPES, REASON, assert_close, both, queries, some_mask

from hf_kvcache.kernels import choose, use_backend
from hf_kvcache.kernels.quant_pack import quant_pack
from hf_kvcache.kernels.sparse_attention import SparseRows, sparse_attention
from hf_kvcache.kernels.sparse_pack import sparse_pack

# without a compiler there is nothing to test; a source that does not compile must fail
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


# for these ops avx512_vnni is avx512
isa = on_levels("avx512_vnni")


def rows(x, form, spare=37):
    """Sparse rows of `x` as views into larger buffers, as the stores hand them out.

    `form` is like "bitmap40", "index24:8" (8-bit codes), "bitmap64:4/2" (in 2 groups), "all" or "all:8".
    """
    form, _, code = form.partition(":")
    layout = form.rstrip("0123456789")
    values, places = x, None
    with use_backend("reference"):
        if layout != "all":
            values, places = sparse_pack(x, keep=int(form[len(layout) :]), layout=layout)
        buffers = {"values": values, "places": places}
        bits = None
        if code:
            bits, _, groups = code.partition("/")
            bits, group_size = int(bits), values.shape[-1] // int(groups or 1)
            codes = quant_pack(values, bits=bits, axis="token", group_size=group_size)
            buffers.update(zip(("values", "scale", "zero"), codes, strict=True))
    views = {name: None if t is None else _in_a_buffer(t, spare) for name, t in buffers.items()}
    return SparseRows(layout="bitmap" if layout == "all" else layout, bits=bits, **views)


def _in_a_buffer(t, spare):
    B, H, n, width = t.shape
    buffer = torch.full((B, H, n + spare, width), 127, dtype=t.dtype)
    buffer[:, :, :n] = t
    return buffer[:, :, :n]


# keys, values, D, packed rows, tail, G, S, B, mask, softcap
CASES = [
    ("bitmap40", "bitmap40", 128, 1300, 31, 4, 1, 1, None, None),
    ("bitmap64", "index40", 128, 500, 0, 7, 3, 2, "full", None),
    ("index64", "bitmap64", 128, 500, 1, 1, 1, 2, "batch", 5.0),
    ("index40", "index40", 128, 1300, 0, 4, 40, 1, "shared", None),
    ("bitmap40", "bitmap40", 128, 500, 9, 4, 40, 1, None, None),
    ("bitmap40:8", "bitmap40:4", 128, 500, 31, 4, 1, 1, None, None),
    ("index64:4/2", "index64:2/4", 128, 500, 0, 7, 1, 1, "heads", 20.0),
    ("bitmap48:3", "index32:3/2", 64, 500, 5, 4, 3, 2, "batch", None),
    ("bitmap80:8/2", "bitmap32:8", 96, 31, 31, 1, 40, 1, "shared", None),
    ("bitmap24", "index24", 80, 500, 31, 4, 1, 2, "heads", None),
    ("index48", "bitmap32", 96, 31, 0, 7, 1, 1, None, None),
    ("bitmap8", "index7", 20, 500, 3, 4, 3, 1, "full", None),
    ("index12", "bitmap10", 24, 31, 0, 1, 1, 2, None, None),
    ("bitmap1", "index1", 8, 31, 3, 4, 1, 1, None, None),
    ("bitmap100", "index200", 256, 500, 0, 4, 1, 1, "shared", None),
    ("index256", "bitmap256", 256, 31, 1, 9, 9, 1, None, 5.0),
    ("all", "bitmap64", 128, 500, 31, 4, 1, 1, None, None),
    ("index40", "all", 128, 500, 0, 4, 40, 1, "batch", None),
    ("all:8", "bitmap64:4", 128, 500, 3, 7, 1, 1, None, None),
    ("all", "all", 20, 31, 3, 4, 3, 2, "full", None),
    ("bitmap40:4", "all:4/2", 80, 31, 0, 2, 1, 1, None, None),
    ("bitmap5", "bitmap5", 64, 1, 0, 4, 1, 1, None, None),
    ("bitmap40", "index40", 128, 0, 31, 4, 1, 1, None, None),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "{}-{}-d{}-n{}+{}-g{}-s{}-b{}-{}-cap{}".format(*c))
def test_attention(isa, case, dtype):
    k_form, v_form, D, n, m, G, S, B, mask, softcap = case
    torch.manual_seed(0)
    keys, values = (rows(torch.randn(B, 2, n, D).to(dtype), form) for form in (k_form, v_form))
    tail = [_in_a_buffer(torch.randn(B, 2, m, D).to(dtype), 5) for _ in range(2)] if m else (None, None)
    mask = some_mask(mask, B, 2, S, n + m)
    q = queries(B, 2 * G, S, D, dtype)
    ref, out = both(sparse_attention, q, keys, values, *tail, scaling=D**-0.5, mask=mask, softcap=softcap)
    assert_close("attention", ref, out, dtype)


@pytest.mark.parametrize("form", ["bitmap40", "index40", "bitmap40:8", "all"])
def test_rows_at_the_very_end_of_their_memory(isa, form):
    """Registers read ahead of a row only where there is more of it; equal to the same rows inside a buffer."""
    torch.manual_seed(0)
    x, q = torch.randn(1, 2, 65, 128).bfloat16(), queries(1, 8, 1, 128, torch.bfloat16)
    inside, end = rows(x, form), rows(x, form, spare=0)
    with use_backend("native"):
        want, got = (sparse_attention(q, side, side, scaling=0.1)[0] for side in (inside, end))
    assert torch.equal(want, got)


def test_strides_no_store_has(isa):
    torch.manual_seed(0)
    keys, values = rows(torch.randn(2, 3, 100, 64), "bitmap24"), rows(torch.randn(2, 3, 100, 64), "index24:8")
    q, tail = torch.randn(2, 6, 64, 3).transpose(2, 3), torch.randn(2, 3, 64, 9).transpose(2, 3)
    mask = (torch.rand(1, 1, 109, 3) > 0.3).transpose(2, 3)

    def shuffled(side):
        """The same rows with the rows of a batch row interleaved over heads, and bytes not adjacent."""
        sides = {name: t for name, t in side._asdict().items() if isinstance(t, torch.Tensor)}
        views = {name: t.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for name, t in sides.items()}
        heads = {name: t.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3) for name, t in sides.items()}
        return side._replace(**views), side._replace(**heads)

    for k, v in zip(shuffled(keys), shuffled(values), strict=True):
        ref, out = both(sparse_attention, q, k, v, tail, tail, scaling=0.1, mask=mask)
        assert_close("strides", ref, out, torch.float32)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["k", "v"])
def test_special_numbers_are_not_hidden(isa, where, number):
    torch.manual_seed(0)
    x = {name: torch.randn(1, 2, 200, 64) for name in "kv"}
    x[where][0, 1, 70, 3] = number
    for dtype in DTYPES:
        q = queries(1, 4, 1, 64, dtype).abs()  # a key of -inf would just not be seen
        ref, out = both(sparse_attention, q, *(rows(x[name].to(dtype), "bitmap24") for name in "kv"), scaling=0.1)
        assert not ref[0].isfinite().all()
        assert_close("special", ref, out, dtype)


@pytest.mark.parametrize("form", ["bitmap16", "bitmap16:8", "all", "all:8"])
@pytest.mark.parametrize("S", [1, 12])
def test_nothing_of_an_earlier_call_remains(isa, form, S):
    """Scratch memory stays with its thread: padding of ragged rows must not be what a call with NaN left there."""
    torch.manual_seed(0)
    x, q = torch.randn(1, 1, 100, 24), queries(1, 2, S, 24, torch.float32)
    with use_backend("native"):
        want = sparse_attention(q, rows(x, form), rows(x, form), scaling=0.1)[0]
        for D in (24, 32, 256):
            nan = rows(torch.full((1, 1, 100, D), float("nan")), "all")
            sparse_attention(queries(1, 2, S, D, torch.float32), nan, nan, scaling=0.1)
            assert torch.equal(sparse_attention(q, rows(x, form), rows(x, form), scaling=0.1)[0], want), D
    assert want.isfinite().all()


def test_threads_do_not_change_the_result():
    torch.manual_seed(0)
    x, q = torch.randn(1, 2, 9000, 128).bfloat16(), queries(1, 8, 1, 128, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with use_backend("native"):
                packed = sparse_pack(x, keep=40, layout="bitmap")
                side = SparseRows(*packed)
                results.append((*packed, *sparse_attention(q, side, side, scaling=0.1)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def numbers(kind, shape):
    x = torch.randn(shape)
    if kind == "ties":
        x = (2 * x).round()
    elif kind == "constant":
        x = torch.ones(shape)
    elif kind == "zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    elif kind == "special":
        for number in (float("nan"), float("inf"), -float("inf"), -0.0, 1e-41):
            x[torch.rand(shape) < 0.1] = number
    return x


@pytest.mark.parametrize("kind", ["random", "ties", "constant", "zeros", "special"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_pack_is_the_reference_bit_for_bit(isa, dtype, kind):
    torch.manual_seed(0)
    for D, keeps in ((1, (1,)), (20, (7,)), (80, (40,)), (127, (1, 64)), (128, (40, 64, 128)), (256, (100, 255))):
        x = numbers(kind, (2, 2, 67, D)).to(dtype)[:, :, :66]
        for keep in keeps:
            for layout in ("bitmap", "index"):
                ref, out = both(sparse_pack, x, keep=keep, layout=layout)
                assert same_bits(ref[0], out[0]), f"values, D={D}, keep={keep}, {layout}"
                assert same_bits(ref[1], out[1]), f"places, D={D}, keep={keep}, {layout}"


@pytest.mark.parametrize("group_size", [2, 4, 10, 40])
def test_pack_in_groups(isa, group_size):
    torch.manual_seed(0)
    for kind in ("random", "ties", "special"):
        for dtype in (torch.float32, torch.bfloat16):
            x = numbers(kind, (1, 2, 33, 80)).to(dtype)
            ref, out = both(sparse_pack, x, keep=40, layout="bitmap", group_size=group_size)
            assert same_bits(ref[0], out[0]) and same_bits(ref[1], out[1]), (kind, dtype)


@pytest.mark.parametrize("weight", [*DTYPES, torch.float8_e5m2], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_pack_by_importance(isa, dtype, weight):
    torch.manual_seed(0)
    x = numbers("special", (2, 2, 40, 64)).to(dtype).transpose(2, 3)  # elements of a row are not adjacent
    importance = numbers("ties", (2, 64, 2, 40)).to(weight).transpose(1, 2)
    # the reference cannot take the magnitude of 8-bit floats
    with use_backend("reference"):
        ref = sparse_pack(x, keep=20, layout="index", importance=importance.float())
    with use_backend("native"):
        out = sparse_pack(x, keep=20, layout="index", importance=importance)
    assert same_bits(ref[0], out[0]) and same_bits(ref[1], out[1])


def test_what_native_code_leaves_to_the_reference():
    x = torch.randn(1, 1, 4, 64)
    assert "float64" in choose("sparse_pack", CPU, (x, 8, "bitmap", None, x.double())).reason
    side = rows(x, "bitmap16:8")
    assert choose("sparse_attention", CPU, (x, side, side)).backend == "native"
    other = side._replace(scale=side.scale.float())
    assert "float16" in choose("sparse_attention", CPU, (x, side, other)).reason
