"""The C++ backend of ragged_attention against the reference, on every instruction set this CPU has."""

import pytest
import torch
from rooms import on_levels
from test_native import CPU, DTYPES, REASON, a_view, assert_close, both, queries, some_mask

from hf_kvcache.kernels import choose, use_backend
from hf_kvcache.kernels.dense_attention import dense_attention
from hf_kvcache.kernels.merge_states import merge_two
from hf_kvcache.kernels.quant_pack import quant_pack
from hf_kvcache.kernels.ragged_attention import ragged_attention
from hf_kvcache.kernels.sparse_attention import SparseRows
from hf_kvcache.kernels.sparse_pack import sparse_pack

# without a compiler there is nothing to test; a source that does not compile must fail
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


isa = on_levels()


def block_table(lengths, page, spare=2):
    """Pages of every head in random order, garbage behind the end of a head; and the number of pages of the pool."""
    counts = (lengths + page - 1) // page
    P = int(counts.sum()) + spare
    free = iter(torch.randperm(P).tolist())
    table = torch.full((*lengths.shape, int(counts.max()) + 1), 2**31 - 1, dtype=torch.int32)
    for head in torch.cartesian_prod(*(torch.arange(n) for n in lengths.shape)).tolist():
        for i in range(counts[tuple(head)]):
            table[(*head, i)] = next(free)
    return table, P


def fields(form, x):
    """The fields of the rows `x`; `form` is like "bitmap40", "index24:8" (codes), "all:4/2" (in 2 groups), "all"."""
    form, _, code = form.partition(":")
    layout = form.rstrip("0123456789")
    found, bits = {"values": x}, None
    with use_backend("reference"):
        if layout != "all":
            found = dict(zip(("values", "places"), sparse_pack(x, keep=int(form[len(layout) :]), layout=layout)))
        if code:
            bits, _, groups = code.partition("/")
            bits, group_size = int(bits), found["values"].shape[-1] // int(groups or 1)
            codes = quant_pack(found["values"], bits=bits, axis="token", group_size=group_size)
            found.update(zip(("values", "scale", "zero"), codes))
    return found, {"layout": "bitmap" if layout == "all" else layout, "bits": bits}


def pool(form, x, lengths, table, P, page):
    """The rows `x` [1, 1, sum(lengths), D], head after head, in their pages; NaN and noise wherever no row is."""
    found, how = fields(form, x)
    in_pages = {"places": None}
    for name, t in found.items():
        noise = torch.randint(0, 256, (P, 1, page, t.shape[-1] * t.element_size()), dtype=torch.uint8)
        in_pages[name] = noise.view(t.dtype)
        if t.is_floating_point():
            in_pages[name].fill_(float("nan"))
    start = 0
    for held, n in zip(table.flatten(0, 1), lengths.flatten().tolist()):
        for i in range(n):
            for name, t in found.items():
                in_pages[name][held[i // page], 0, i % page] = t[0, 0, start + i]
        start += n
    return SparseRows(**in_pages, **how)


def operands(forms, D, G, S, lengths, page, dtype):
    lengths = torch.tensor(lengths, dtype=torch.int32)
    (B, Hkv), table_and_size = lengths.shape, block_table(lengths, page)
    rows = [torch.randn(1, 1, int(lengths.sum()), D).to(dtype) for _ in forms]
    sides = [pool(form, x, lengths, *table_and_size, page) for form, x in zip(forms, rows)]
    return queries(B, Hkv * G, S, D, dtype), *sides, table_and_size[0], lengths


# keys, values, D, page, lengths, G, S, softcap
CASES = [
    ("all", "all", 128, 64, [[0, 1, 63, 64, 65, 1300]], 4, 1, None),
    ("all", "all", 64, 16, [[15, 700], [17, 0]], 7, 3, 5.0),
    ("all", "all", 80, 32, [[200, 31], [1, 33]], 1, 1, None),
    ("all", "all", 20, 16, [[130, 16]], 4, 3, None),
    ("all", "all", 256, 48, [[500, 49, 47]], 4, 40, 20.0),
    ("all", "all", 512, 16, [[40, 3]], 2, 1, None),
    ("all:4", "all:4", 128, 64, [[0, 1, 63, 64, 65, 1300]], 4, 1, None),
    ("all:4", "all:4", 128, 16, [[15, 16, 17, 700]], 4, 1, 5.0),
    ("all:8", "all:4/4", 128, 32, [[200, 31], [33, 0]], 7, 3, None),
    ("all:2", "all:2/2", 256, 16, [[129, 127]], 1, 40, None),
    ("all:4", "all:8", 64, 48, [[200, 49]], 4, 3, None),
    ("all:8", "all:8", 16, 16, [[33, 100]], 7, 1, None),
    ("all:3", "all:3/2", 64, 16, [[40, 3], [0, 70]], 4, 1, None),
    ("all:4/2", "all:2/4", 80, 32, [[40, 300]], 1, 3, None),
    ("all:4", "all", 128, 16, [[1, 300, 0]], 4, 1, None),
    ("all", "all:8", 80, 64, [[300, 64]], 4, 3, None),
    ("bitmap64", "bitmap64", 128, 64, [[0, 1, 63, 64, 65, 1300]], 4, 1, None),
    ("bitmap40", "index40", 128, 16, [[15, 16, 17, 700]], 4, 1, 5.0),
    ("index64", "bitmap64", 256, 32, [[200, 31], [33, 0]], 7, 3, None),
    ("bitmap24", "index24", 80, 16, [[130, 5]], 4, 40, None),
    ("bitmap8", "index7", 20, 48, [[130, 47]], 1, 1, None),
    ("bitmap5", "bitmap16", 16, 16, [[1, 31]], 4, 3, None),
    ("bitmap40:8", "bitmap40:4", 128, 16, [[200, 15]], 4, 1, None),
    ("index64:4/2", "index64:2/4", 128, 64, [[200, 63], [0, 1]], 7, 1, 20.0),
    ("bitmap48:3", "index32:3/2", 64, 32, [[70, 1]], 4, 3, None),
    ("bitmap64", "all:4", 128, 16, [[300, 17]], 4, 1, None),
    ("all:4", "index40:8", 128, 32, [[300, 33]], 4, 40, None),
    ("all", "bitmap32", 64, 64, [[300, 1]], 7, 1, None),
    ("all", "all", 64, 16, [[0, 0], [0, 0]], 2, 3, None),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "{}-{}-d{}-page{}-n{}-g{}-s{}-cap{}".format(*c))
def test_attention(isa, case, dtype):
    *forms, D, page, lengths, G, S, softcap = case
    torch.manual_seed(0)
    ref, out = both(ragged_attention, *operands(forms, D, G, S, lengths, page, dtype), scaling=D**-0.5, softcap=softcap)
    assert out[0].isfinite().all(), "garbage was read"
    assert_close("attention", ref, out, dtype)


# keys and values, D, page, lengths, G, S, rows of the tail, mask of the tail, softcap
TAILS = [
    ("all", 64, 32, [[0, 1, 63, 64, 65, 1300]], 4, 1, 40, None, None),
    ("all", 128, 16, [[500, 49], [0, 31]], 2, 3, 35, "full", 5.0),
    ("all", 80, 32, [[200, 31]], 1, 40, 300, "shared", None),
    ("all:4", 128, 32, [[700, 3], [0, 70]], 4, 1, 8, None, None),
    ("all:8", 64, 16, [[40, 300]], 7, 3, 65, "heads", None),
    ("bitmap40", 128, 16, [[15, 700]], 4, 1, 33, "batch", None),
    ("index24:4", 80, 48, [[130, 5]], 1, 3, 31, None, 20.0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", TAILS, ids=lambda c: "{}-d{}-page{}-n{}-g{}-s{}-tail{}-{}-cap{}".format(*c))
def test_a_tail_is_more_rows_of_every_head(isa, case, dtype):
    form, D, page, lengths, G, S, n_tail, mask, softcap = case
    torch.manual_seed(0)
    q, *pages = operands((form, form), D, G, S, lengths, page, dtype)
    B, Hkv = pages[-1].shape
    tail, mask = [a_view(B, Hkv, n_tail, D, dtype) for _ in "kv"], some_mask(mask, B, Hkv, S, n_tail)
    knobs = {"scaling": D**-0.5, "softcap": softcap}
    ref, out = both(ragged_attention, q, *pages, *tail, mask=mask, **knobs)
    assert_close("both parts", ref, out, dtype)
    with use_backend("reference"):
        parts = ragged_attention(q, *pages, **knobs), dense_attention(q, *tail, mask=mask, **knobs)
    assert_close("parts", merge_two(*parts), ref, dtype)


def test_what_does_not_go_with_pages_is_refused():
    q, *pages = operands(("all", "all"), 64, 2, 1, [[3, 40]], 16, torch.float32)
    k = torch.randn(1, 2, 5, 64)
    with pytest.raises(ValueError, match="does not go with the pages"):
        ragged_attention(q, *pages, k[:, :1], k[:, :1], scaling=1.0)
    with pytest.raises(ValueError, match="a mask is of the tail"):
        ragged_attention(q, *pages, mask=torch.ones(1, 1, 1, 5, dtype=torch.bool), scaling=1.0)


def test_heads_are_those_of_dense_attention():
    """Every head by itself, as its rows were before they came into pages."""
    torch.manual_seed(0)
    lengths, D = torch.tensor([[700, 3, 0], [64, 65, 1]], dtype=torch.int32), 64
    table, P = block_table(lengths, 32)
    rows = [torch.randn(1, 1, int(lengths.sum()), D) for _ in "kv"]
    q = queries(2, 6, 1, D, torch.float32)
    with use_backend("native"):
        out, lse = ragged_attention(
            q, *(pool("all", x, lengths, table, P, 32) for x in rows), table, lengths, scaling=0.1
        )
        parts = [x.split(lengths.flatten().tolist(), dim=2) for x in rows]
        for i, (k, v) in enumerate(zip(*parts)):
            b, heads = i // 3, slice(i % 3 * 2, i % 3 * 2 + 2)
            want = dense_attention(q[b : b + 1, heads], k, v, scaling=0.1)
            assert_close(f"head {i}", want, (out[b : b + 1, heads], lse[b : b + 1, heads]), torch.float32)


@pytest.mark.parametrize("forms", [("all", "all"), ("all:4", "all:4"), ("bitmap24", "index24:8")], ids=str)
def test_strides_no_store_has(isa, forms):
    torch.manual_seed(0)
    q, keys, values, table, lengths = operands(forms, 64, 2, 3, [[100, 3], [0, 33]], 16, torch.float32)

    def apart(t, dim):
        """`t` as every second element of a larger tensor."""
        wide = torch.stack((t, torch.full_like(t, 127)), dim + 1)
        return wide.select(dim + 1, 0)

    def views(side, change):
        return side._replace(**{n: change(t) for n, t in side._asdict().items() if isinstance(t, torch.Tensor)})

    places = [apart(table, 2), apart(table, 0), table.permute(2, 1, 0).contiguous().permute(2, 1, 0)]
    ends = [apart(lengths, 1), lengths.T.contiguous().T, apart(lengths, 0)]
    changes = [lambda t: apart(t, 0), lambda t: apart(t, 2), lambda t: t.transpose(0, 2).contiguous().transpose(0, 2)]
    for held, n, change in zip(places, ends, changes):
        ref, out = both(ragged_attention, q, views(keys, change), views(values, change), held, n, scaling=0.1)
        assert_close("strides", ref, out, torch.float32)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["keys", "values"])
def test_special_numbers_are_not_hidden(isa, where, number):
    for dtype in DTYPES:
        torch.manual_seed(0)
        q, keys, values, table, lengths = operands(("all", "all"), 64, 2, 1, [[100, 100]], 16, dtype)
        side = {"keys": keys, "values": values}[where]
        side.values[table[0, 1, 5], 0, 3, 7] = number
        ref, out = both(ragged_attention, q.abs(), keys, values, table, lengths, scaling=0.1)
        assert not ref[0].isfinite().all()
        assert_close("special", ref, out, dtype)


@pytest.mark.parametrize("forms", [("all", "all"), ("all:4", "all:4"), ("bitmap40", "bitmap40:8")], ids=str)
def test_threads_do_not_change_the_result(forms):
    torch.manual_seed(0)
    args = operands(forms, 128, 4, 1, [[5000, 300, 0, 1]], 64, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with use_backend("native"):
                results.append(ragged_attention(*args, scaling=0.1))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_the_order_of_pages_does_not_matter():
    torch.manual_seed(0)
    q, keys, values, table, lengths = operands(("all", "bitmap40:8"), 128, 4, 1, [[700, 30]], 32, torch.float32)
    order = torch.randperm(keys.values.shape[0])
    moved = [
        side._replace(**{n: t[order] for n, t in side._asdict().items() if isinstance(t, torch.Tensor)})
        for side in (keys, values)
    ]
    with use_backend("native"):
        want = ragged_attention(q, keys, values, table, lengths, scaling=0.1)
        valid = table < len(order)
        elsewhere = torch.where(valid, order.argsort()[torch.where(valid, table, 0).long()].int(), table)
        got = ragged_attention(q, *moved, elsewhere, lengths, scaling=0.1)
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])


def test_what_native_code_leaves_to_the_reference():
    def choice(form, D, page):
        q, keys, values, *_ = operands((form, form), D, 1, 1, [[page]], page, torch.float32)
        return choose("ragged_attention", CPU, (q, keys, values))

    assert choice("all", 64, 16).backend == choice("all", 512, 16).backend == "native"
    assert "multiple of 16" in choice("all", 64, 24).reason
    assert "256" in choice("all:8", 512, 16).reason
