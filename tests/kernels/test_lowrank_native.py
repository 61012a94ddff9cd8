"""The C++ backend of low-rank attention against the reference, on every instruction set this CPU has."""

import math

import pytest
import torch
from rooms import on_levels
from test_native import CPU, DTYPES, REASON, assert_close, both, queries, some_mask

from hf_kvcache.kernels import choose, use_backend
from hf_kvcache.kernels.lowrank_attention import KeyExpansion, Latents, lowrank_attention
from hf_kvcache.kernels.lowrank_attention.reference import _unpacked
from hf_kvcache.kernels.quant_pack import quant_pack
from hf_kvcache.rope import FINE, RotaryTables, rotate

# without a compiler there is nothing to test; a source that does not compile must fail
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


# for this op the levels between are avx512
isa = on_levels("avx512_vbmi2", "avx512_vnni")


def in_a_buffer(x, spare=37):
    """Rows in a buffer with room for more, as the stores keep them; what lies behind them must not matter."""
    B, H, n, width = x.shape
    buffer = torch.full((B, H, n + spare, width), float("nan") if x.is_floating_point() else -1, dtype=x.dtype)
    buffer[:, :, :n] = x
    return buffer[:, :, :n]


def side(B, G, n, form, dtype, spare=37):
    """Latents of random numbers; `form` is like "64", "512:4" (4-bit codes) or "64:8/2" (in 2 groups)."""
    rank, _, code = form.partition(":")
    x = torch.randn(B, G, n, int(rank))
    if not code:
        return Latents(in_a_buffer(x.to(dtype), spare))
    bits, _, groups = code.partition("/")
    with use_backend("reference"):
        packed = quant_pack(x, bits=int(bits), axis="token", group_size=int(rank) // int(groups or 1))
    return Latents(*(in_a_buffer(t, spare) for t in packed), int(bits))


def rotary_tables(limit, channels, base=10000.0):
    inv_freq = base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)

    def table(n, step):
        angles = torch.outer(torch.arange(n, dtype=torch.float64) * step, inv_freq)
        return torch.stack([angles.cos(), angles.sin()]).float()

    return RotaryTables(table(math.ceil(limit / FINE), FINE), table(FINE, 1))


def expansion(B, H, n, rank, D, rotated, dtype, *, where="left", heads=1, mean=True):
    """An expansion whose positions are not consecutive: padded on the left, with gaps, or far out."""
    up = in_a_buffer(torch.randn(1, H, rank, D).to(dtype) / rank**0.5, 3)[0]
    if not rotated:
        return KeyExpansion(up, torch.randn(H, D) if mean else None)
    positions = torch.arange(n).repeat(B, heads, 1) + (100_000 - n // 2 if where == "far" else 0)
    if where == "left":
        positions = (positions - 7 * torch.arange(B).view(B, 1, 1)).clamp(min=0)
    if where == "gaps":
        positions = positions * 3 + torch.randint(0, 3, positions.shape)
    limit = int(positions.max()) + 1 if n else 1
    room = torch.full((B, heads, n + 5), -1, dtype=torch.int32)
    room[..., :n] = positions
    return KeyExpansion(up, torch.randn(H, D) if mean else None, room[..., :n], rotary_tables(limit, rotated))


def assert_as_exact(name, ref, out, dtype, rounded=False):
    """The output is float32 whatever the dtype; `rounded`: latents that were decoded to bfloat16."""
    (ref_out, ref_lse), (got_out, got_lse) = ref, out
    assert got_out.dtype == torch.float32
    if rounded and dtype == torch.bfloat16:
        assert (ref_lse - got_lse).nan_to_num(0, 0, 0).abs().max() <= 1e-2, f"{name}: lse"
        got_lse = ref_lse
    # only products of bfloat16 pairs round: half an ulp of a weight, keys are float32
    assert_close(name, (ref_out, ref_lse), (got_out, got_lse), dtype if dtype == torch.bfloat16 else torch.float32)
    if dtype == torch.bfloat16:
        ref_out, got_out = ref_out.nan_to_num(), got_out.nan_to_num()
        limit = (1e-2 if rounded else 4e-3) * max(1.0, ref_out.abs().max().item() if ref_out.numel() else 0)
        assert (ref_out - got_out).abs().max() <= limit, f"{name}: output"


# keys, values, D, rotated channels (None: absorbed), positions, their heads, G_k, G_v, Hkv, G, n, S, B, mask, softcap
CASES = [
    ("64", "64", 128, 128, "left", 1, 8, 8, 8, 4, 1025, 1, 1, None, None),
    ("64", "512", 128, 128, "gaps", 1, 4, 1, 4, 7, 500, 1, 1, "batch", None),
    ("64:4", "64:4", 128, 128, "left", 1, 2, 2, 2, 4, 500, 1, 2, "full", None),
    ("64:4", "512:4", 128, 128, "gaps", 1, 4, 1, 4, 1, 1025, 1, 1, None, 5.0),
    ("512", "512", 64, 64, "far", 1, 1, 1, 4, 4, 500, 1, 1, None, None),
    ("24", "33", 80, 80, "left", 2, 2, 1, 2, 7, 63, 5, 2, "heads", None),
    ("33", "24", 128, 32, "far", 1, 3, 2, 6, 4, 500, 1, 2, "shared", 20.0),
    ("16:8", "16:2", 96, 24, "gaps", 4, 2, 4, 4, 1, 63, 1, 1, None, None),
    ("16:3", "32:3/2", 20, 10, "left", 1, 2, 2, 4, 4, 500, 5, 1, "shared", None),
    ("64:8/2", "64:4/4", 128, 0, "left", 1, 2, 1, 2, 4, 1025, 1, 2, "batch", None),
    ("64:2", "128:8", 256, 256, "far", 1, 2, 1, 2, 1, 63, 1, 1, None, None),
    ("1", "1", 2, 2, "gaps", 1, 1, 1, 1, 1, 63, 1, 1, None, None),
    ("64", "64", 128, 128, "left", 1, 2, 2, 2, 4, 1, 1, 2, None, None),
    ("64", "64", 128, 128, "left", 1, 2, 2, 2, 4, 0, 1, 1, None, None),
    ("64", "48", 128, 128, "left", 1, 2, 1, 4, 4, 200, 32, 1, "shared", None),
    ("64", "64", 64, None, "", 0, 8, 8, 8, 4, 1025, 1, 1, None, None),
    ("512", "512", 512, None, "", 0, 1, 1, 1, 28, 500, 1, 2, "batch", None),
    ("64", "512", 64, None, "", 0, 4, 1, 4, 7, 500, 1, 1, "full", 5.0),
    ("512:4", "64:4", 512, None, "", 0, 1, 4, 4, 4, 500, 1, 1, None, None),
    ("64:4", "64:4", 64, None, "", 0, 2, 2, 2, 4, 1025, 5, 2, "shared", None),
    ("33", "24", 33, None, "", 0, 2, 1, 2, 7, 63, 1, 1, None, None),
    ("16:8", "24:2", 16, None, "", 0, 2, 2, 2, 1, 63, 5, 1, "heads", 20.0),
    ("48:3", "64:8/2", 48, None, "", 0, 3, 1, 3, 4, 500, 1, 2, None, None),
    ("64:4/2", "33", 64, None, "", 0, 2, 2, 2, 4, 1, 1, 1, None, None),
]


NAME = "{}-{}-d{}-r{}-{}{}-k{}-v{}-h{}-g{}-n{}-s{}-b{}-{}-cap{}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=lambda c: NAME.format(*c))
def test_attention(isa, case, dtype):
    k_form, v_form, D, rotated, where, heads, G_k, G_v, H, G, n, S, B, mask, softcap = case
    torch.manual_seed(0)
    keys, values = side(B, G_k, n, k_form, dtype), side(B, G_v, n, v_form, dtype)
    how = None if rotated is None else expansion(B, H, n, keys.rank, D, rotated, dtype, where=where, heads=heads)
    mask = some_mask(mask, B, H, S, n)
    q = queries(B, H * G, S, D, dtype)
    ref, out = both(lowrank_attention, q, keys, values, how, scaling=D**-0.5, mask=mask, softcap=softcap)
    assert_as_exact("attention", ref, out, dtype, rounded="/" in k_form)


@pytest.mark.parametrize("rotated", [128, None], ids=["rebuilt", "absorbed"])
@pytest.mark.parametrize("form", ["64", "64:4"])
def test_no_worse_than_eager_bfloat16(isa, rotated, form):
    """Against float64; eager is the same maths in bfloat16, from latents that are given."""
    torch.manual_seed(0)
    dtype, H, n, D = torch.bfloat16, 2, 1025, 128 if rotated else 64
    keys, values, q = side(1, H, n, form, dtype), side(1, 1, n, form, dtype), queries(1, 4 * H, 1, D, dtype)
    how = expansion(1, H, n, 64, D, rotated, dtype, where="gaps") if rotated else None

    def dense(x):
        return _unpacked(x, slice(None), torch.float64)

    def eager(dtype):
        k, v = dense(keys).to(dtype), dense(values).to(dtype)
        if how:
            cos, sin = (x.to(dtype) for x in how.tables.cos_sin(how.positions))
            k = rotate(k @ how.up.to(dtype) + how.mean.to(dtype).unsqueeze(1), cos, sin)
        scores = (q.to(dtype).view(1, H, 4, D) @ k.transpose(2, 3)) * D**-0.5
        return (scores.softmax(-1) @ v).view(1, 4 * H, 1, -1)

    exact = eager(torch.float64)
    with use_backend("native"):
        got = lowrank_attention(q, keys, values, how, scaling=D**-0.5)[0]
    assert (got - exact).abs().max() <= (eager(dtype) - exact).abs().max()


@pytest.mark.parametrize("form", ["64", "33", "64:4", "48:3", "16:8"])
@pytest.mark.parametrize("rotated", [20, None], ids=["rebuilt", "absorbed"])
def test_rows_at_the_very_end_of_their_memory(isa, form, rotated):
    """Equal to the same rows inside a buffer."""
    for dtype in DTYPES:
        results = []
        for spare in (0, 37):
            torch.manual_seed(0)
            keys, values = side(1, 2, 65, form, dtype, spare), side(1, 2, 65, form, dtype, spare)
            how = expansion(1, 2, 65, keys.rank, 24, rotated, dtype) if rotated else None
            q = queries(1, 4, 1, 24 if rotated else keys.rank, dtype)
            with use_backend("native"):
                results.append(lowrank_attention(q, keys, values, how, scaling=0.1)[0])
        assert torch.equal(*results)


def test_strides_no_store_has(isa):
    torch.manual_seed(0)
    mask = (torch.rand(1, 1, 100, 3) > 0.3).transpose(2, 3)
    for dtype in DTYPES:
        q = torch.randn(2, 6, 64, 3).transpose(2, 3).to(dtype)
        keys, values = side(2, 3, 100, "24", dtype), side(2, 3, 100, "32:4", dtype)
        how = expansion(2, 3, 100, 24, 64, 64, dtype)
        how = how._replace(up=how.up.transpose(1, 2).contiguous().transpose(1, 2), mean=how.mean.t().contiguous().t())
        how = how._replace(positions=how.positions.permute(2, 0, 1).contiguous().permute(1, 2, 0))

        def rearranged(x, order):
            tensors = {name: t for name, t in x._asdict().items() if isinstance(t, torch.Tensor)}
            back = [order.index(i) for i in range(4)]
            return x._replace(**{name: t.permute(order).contiguous().permute(back) for name, t in tensors.items()})

        # bytes of a row not adjacent; heads interleaved within a token
        for order in ((3, 0, 2, 1), (0, 2, 1, 3)):
            args = q, rearranged(keys, order), rearranged(values, order), how
            ref, out = both(lowrank_attention, *args, scaling=0.1, mask=mask)
            assert_as_exact("strides", ref, out, dtype)


@pytest.mark.parametrize("where", ["k", "v", "up", "mean", "scale", "zero"])
@pytest.mark.parametrize("rotated", [64, None], ids=["rebuilt", "absorbed"])
def test_nan_is_not_hidden(isa, where, rotated):
    if rotated is None and where in ("up", "mean"):
        return
    for dtype in DTYPES:
        torch.manual_seed(0)
        keys, values = (side(1, 2, 200, "32:4" if where in ("scale", "zero") else "32", dtype) for _ in "kv")
        how = expansion(1, 2, 200, 32, 64, rotated, dtype) if rotated else None
        target = {"k": keys.rows, "v": values.rows, "scale": keys.scale, "zero": values.zero}
        if rotated:
            target |= {"up": how.up.unsqueeze(0), "mean": how.mean[None, :, None]}
        target[where][0, 1, min(70, target[where].shape[2] - 1), 0] = float("nan")
        q = queries(1, 4, 1, 64 if rotated else 32, dtype)
        ref, out = both(lowrank_attention, q, keys, values, how, scaling=0.1)
        assert ref[0].isnan().any() and not ref[0].isnan().all()
        assert_as_exact("nan", ref, out, dtype)


def test_a_position_without_an_angle_is_not_hidden(isa):
    torch.manual_seed(0)
    keys = side(1, 1, 200, "32", torch.float32)
    how = expansion(1, 1, 200, 32, 64, 64, torch.float32)
    for position in (-1, how.tables.limit):
        how.positions[0, 0, 70] = position
        with use_backend("native"):
            assert lowrank_attention(queries(1, 2, 1, 64, torch.float32), keys, keys, how, scaling=0.1)[0].isnan().all()


@pytest.mark.parametrize("form", ["24", "16:8", "48:3"])
@pytest.mark.parametrize("rotated", [20, None], ids=["rebuilt", "absorbed"])
def test_nothing_of_an_earlier_call_remains(isa, form, rotated):
    """Scratch memory stays with its thread: padding must not be what a call with NaN left there."""
    for dtype in DTYPES:
        torch.manual_seed(0)
        keys, values = side(1, 2, 100, form, dtype), side(1, 1, 100, form, dtype)
        how = expansion(1, 2, 100, keys.rank, 42, rotated, dtype) if rotated else None
        q = queries(1, 4, 3, 42 if rotated else keys.rank, dtype)
        with use_backend("native"):
            want = lowrank_attention(q, keys, values, how, scaling=0.1)[0]
            assert want.isfinite().all()
            for rank in (24, 64, 300):
                nan = Latents(torch.full((1, 2, 100, rank), float("nan"), dtype=dtype))
                worst = expansion(1, 2, 100, rank, 64, 64, dtype)
                worst = worst._replace(up=worst.up * float("nan"), mean=worst.mean * float("nan"))
                for how_bad, width in ((worst, 64), (None, rank)):
                    lowrank_attention(queries(1, 4, 3, width, dtype) * float("nan"), nan, nan, how_bad, scaling=0.1)
                assert torch.equal(lowrank_attention(q, keys, values, how, scaling=0.1)[0], want), rank


def test_threads_do_not_change_the_result():
    torch.manual_seed(0)
    dtype = torch.bfloat16
    keys, values = side(1, 2, 3000, "64:4", dtype), side(1, 1, 3000, "64", dtype)
    q, how = queries(1, 8, 1, 128, dtype), expansion(1, 2, 3000, 64, 128, 128, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with use_backend("native"):
                results.append(lowrank_attention(q, keys, values, how, scaling=0.1))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_native_code_leaves_to_the_reference():
    x, keys = torch.randn(1, 1, 1, 64), side(1, 1, 4, "64:8", torch.float32)
    assert choose("lowrank_attention", CPU, (x, keys, keys, None)).backend == "native"
    other = keys._replace(scale=keys.scale.float())
    assert "float16" in choose("lowrank_attention", CPU, (x, keys, other, None)).reason
    assert "gradients" in choose("lowrank_attention", CPU, (x.requires_grad_(), keys, keys, None)).reason
