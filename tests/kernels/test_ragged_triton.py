"""Triton kernels of ragged attention against the reference; where they run is said in `test_triton.py`."""

import pytest
import torch
from rooms import telling
from test_sparse_triton import gluon_kernel_in_the_interpreter, two_of_four
from test_triton import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    LOW,
    LSE,
    ON_GPU,
    OUT,
    assert_close,
    run_in_the_interpreter,
    runs_kernels,
)

from hf_kvcache.kernels import BackendUnavailable, use_backend
from hf_kvcache.kernels.quant_pack.reference import quant_pack
from hf_kvcache.kernels.ragged_attention import ragged_attention, reference
from hf_kvcache.kernels.sparse_attention import SparseRows
from hf_kvcache.kernels.sparse_pack.reference import sparse_pack


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests below run here directly")
def test_in_the_interpreter(pytestconfig):
    run_in_the_interpreter(__file__, config=pytestconfig)


def rows_in_pages(x, keep=None, bits=None, groups=1, group_size=None, layout="bitmap"):
    """Rows `[P, 1, page, D]` in a format; `keep=None` keeps all channels in order."""
    values, places = (x, None) if keep is None else sparse_pack(x, keep=keep, layout=layout, group_size=group_size)
    scale = zero = None
    if bits is not None:
        values, scale, zero = quant_pack(values, bits=bits, axis="token", group_size=values.shape[3] // groups)
    return SparseRows(values, places, layout, scale, zero, bits, group_size)


def spoilt(rows, is_row):
    """The same rows with the worst where there is none: NaN, and places that are no addresses."""
    fields = {}
    for name in ("values", "places", "scale", "zero"):
        x = getattr(rows, name)
        if x is not None:
            worst = float("nan") if x.is_floating_point() else 255 if name == "places" else -1
            fields[name] = x.masked_fill(~is_row[:, None, :, None], worst)
    return rows._replace(**fields)


def ragged_case(case, dtype, spoil=True):
    """Operands with pages in random order, three that nobody owns, and rubbish in the table where it may be."""
    page, D, G, S, lengths, k_format, v_format, softcap = case
    torch.manual_seed(page + D + G + S)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    B, Hkv = lengths.shape
    owned = -(-lengths // page)
    n_pages = int(owned.sum()) + 3
    order = torch.randperm(n_pages, dtype=torch.int32)
    table = torch.full((B, Hkv, int(owned.max()) + 1), -(2**31), dtype=torch.int32)
    is_row = torch.zeros(n_pages, page, dtype=torch.bool)
    for b in range(B):
        for h in range(Hkv):
            mine, order = order[: owned[b, h]], order[owned[b, h] :]
            table[b, h, : len(mine)] = mine
            is_row[mine.long()] = (torch.arange(len(mine) * page) < lengths[b, h]).view(-1, page)
    q = torch.randn(B, S, Hkv * G, D).to(DEVICE, dtype).transpose(1, 2)
    sides = []
    for form in (k_format, v_format):
        rows = rows_in_pages(torch.randn(n_pages, 1, page, D).to(DEVICE, dtype), **form)
        sides.append(spoilt(rows, is_row.to(DEVICE)) if spoil else rows)
    # views, as growing stores hand them out
    table = torch.cat([table, table], 2).to(DEVICE)[:, :, : table.shape[2]]
    lengths = lengths.to(DEVICE).T.contiguous().T
    return (q, *sides, table, lengths), {"scaling": D**-0.5, "softcap": softcap}


def assert_like_the_reference(case, dtype):
    operands, arguments = ragged_case(case, dtype)
    q = operands[0]
    with use_backend("triton"):
        out, lse = ragged_attention(*operands, **arguments)
    # the same rows without what is spoilt
    clean = ragged_case(case, dtype, spoil=False)[0]
    expected_out, expected_lse = reference.ragged_attention(q.double(), *clean[1:], **arguments)
    assert out.shape == q.shape and out.dtype == q.dtype and lse.dtype == torch.float32
    assert_close("out", expected_out, out, OUT[dtype])
    assert_close("lse", expected_lse, lse, LSE[dtype])


@runs_kernels
def test_a_tail_is_more_rows_of_every_head():
    dtype = DTYPES[LOW[-1] if ON_GPU else "fp32"]
    (q, *pages), arguments = ragged_case(FUSED["dense-unequal"], dtype, spoil=False)
    (B, Hkv), S, D = pages[-1].shape, q.shape[2], q.shape[3]
    tail = [torch.randn(B, Hkv, 37, D).to(DEVICE, dtype) for _ in "kv"]
    mask = (torch.rand(B, Hkv, S, 37) > 0.3).to(DEVICE)
    with use_backend("triton"):
        out, lse = ragged_attention(q, *pages, *tail, mask=mask, **arguments)
    expected_out, expected_lse = reference.ragged_attention(
        q.double(), *pages, *(x.double() for x in tail), mask=mask, **arguments
    )
    assert_close("out", expected_out, out, OUT[dtype])
    assert_close("lse", expected_lse, lse, LSE[dtype])


UNEQUAL = [[0, 1, 31, 33, 600]]

# name: rows of a page, head size, query heads per kv head, queries, lengths, keys, values, softcap
FUSED = {
    "dense-one-row": (16, 64, 1, 1, [[1]], {}, {}, None),
    "dense-nothing": (16, 64, 4, 1, [[0, 0]], {}, {}, None),
    "dense-unequal": (32, 128, 4, 1, UNEQUAL, {}, {}, None),
    "dense-gqa7-s3-batch-softcap": (64, 80, 7, 3, [[63, 65], [1, 0]], {}, {}, 20.0),
    "dense-256": (16, 256, 8, 1, [[15], [17]], {}, {}, None),
    "dense-odd-head-size": (64, 24, 2, 1, [[100, 3]], {}, {}, None),
    "8bit-64": (16, 64, 4, 1, [[15, 17, 300]], {"bits": 8, "groups": 2}, {"bits": 8}, None),
    "4bit-gqa8-s3": (32, 128, 8, 3, [[31], [65]], {"bits": 4, "groups": 2}, {"bits": 4, "groups": 2}, None),
    "4bit-80-softcap": (64, 80, 7, 1, [[63, 0, 65]], {"bits": 4}, {"bits": 4}, 20.0),
    "2bit-256": (16, 256, 1, 1, [[33]], {"bits": 2, "groups": 8}, {"bits": 2, "groups": 4}, None),
    "4bit-keys-dense-values": (16, 128, 4, 1, [[17, 47]], {"bits": 4, "groups": 4}, {}, None),
    "dense-keys-4bit-values-256": (32, 256, 4, 1, [[33]], {}, {"bits": 4, "groups": 2}, None),
    "8bit-keys-2bit-values": (32, 64, 4, 1, [[1], [70]], {"bits": 8}, {"bits": 2, "groups": 2}, None),
}  # fmt: skip

# rows that are expanded by classes
FUSED |= {
    "bitmap": (16, 128, 4, 1, [[0, 1, 48], [17, 16, 0]], {"keep": 40}, {"keep": 64}, None),
    "bitmap-80-gqa7-s3-softcap": (32, 80, 7, 3, [[33]], {"keep": 24}, {"keep": 40}, 20.0),
    "2:4": (64, 64, 1, 1, [[63, 65]], two_of_four(64), two_of_four(64), None),
    "2:4-keys-dense-values": (16, 256, 4, 1, [[33]], two_of_four(256), {}, None),
    "4bit-bitmap": (32, 128, 4, 1, [[33, 5]], {"keep": 40, "bits": 4}, {"keep": 40, "bits": 4}, None),
    "4bit-keys-bitmap-values": (16, 64, 4, 1, [[16, 5]], {"bits": 4}, {"keep": 20}, None),
    "codes-that-cut-a-field": (16, 64, 4, 1, [[17]], {"bits": 4, "groups": 8}, {"bits": 8, "groups": 4}, None),
}

# more heads than are looked at in one go
MANY_HEADS = (16, 16, 1, 1, [[int(h % 20 == 13) for h in range(65)]] * 2, {}, {}, None)

# rows of channel numbers, which only Gluon reads
BY_PAGE = {
    "index": (
        16, 128, 4, 1, [[0, 17], [32, 1]], {"keep": 40, "layout": "index"}, {"keep": 20, "layout": "index"}, None,
    ),
    "index-keys-bitmap-values-s3-softcap": (
        32, 64, 4, 3, [[33], [1]], {"keep": 20, "layout": "index"}, {"keep": 32}, 20.0,
    ),
    "index-nothing": (16, 64, 1, 1, [[0]], {"keep": 20, "layout": "index"}, {"keep": 20, "layout": "index"}, None),
}  # fmt: skip


@runs_kernels
@pytest.mark.parametrize("dtype", telling(LOW, "fp16"))
@pytest.mark.parametrize("case", telling(FUSED, "dense-gqa7-s3-batch-softcap", "8bit-keys-2bit-values", "4bit-bitmap"))
def test_ragged_attention(case, dtype, monkeypatch):
    from hf_kvcache.kernels.ragged_attention import triton_kernel

    monkeypatch.setattr(triton_kernel, "by_page", None)
    assert_like_the_reference(FUSED[case], DTYPES[dtype])


@runs_kernels
@pytest.mark.parametrize("layout", ["bitmap", "index"])
def test_a_pool_without_pages(layout, gluon):
    q = torch.randn(1, 4, 1, 64, device=DEVICE).half()
    rows = rows_in_pages(torch.randn(3, 1, 16, 64, device=DEVICE).half(), keep=20, layout=layout)
    rows = rows._replace(values=rows.values[:0], places=rows.places[:0])
    table, lengths = (torch.zeros(shape, dtype=torch.int32, device=DEVICE) for shape in ((1, 2, 0), (1, 2)))
    with use_backend("triton"):
        out, lse = ragged_attention(q, rows, rows, table, lengths, scaling=1.0)
    assert out.shape == q.shape and not out.any() and lse.isneginf().all()


@pytest.mark.slow
@runs_kernels
def test_many_heads():
    assert_like_the_reference(MANY_HEADS, torch.float16)


@pytest.fixture
def gluon(monkeypatch):
    from hf_kvcache.kernels.sparse_attention import triton_kernel

    if INTERPRETED:
        stand_in = gluon_kernel_in_the_interpreter()
        monkeypatch.setattr(triton_kernel, "_gluon", lambda: (stand_in, None))
    (q, keys, values, *_), _ = ragged_case(BY_PAGE["index"], torch.float16)
    if why_not := triton_kernel.gluon_obstacle(q, keys, values):
        assert "has no scatter" in why_not, why_not
        pytest.skip(why_not)


@runs_kernels
@pytest.mark.parametrize("case", telling(BY_PAGE, "index-keys-bitmap-values-s3-softcap"))
def test_ragged_attention_by_page(case, gluon, monkeypatch):
    from hf_kvcache.kernels.ragged_attention import by_page

    monkeypatch.setattr(by_page, "CHUNK", 3)
    assert_like_the_reference(BY_PAGE[case], torch.float16)


@runs_kernels
@pytest.mark.parametrize("case", telling(["dense-256", "8bit-keys-2bit-values", "4bit-bitmap", "index"], "dense-256"))
def test_the_host_does_not_wait_for_the_device(case, request, monkeypatch):
    if case in BY_PAGE:
        request.getfixturevalue("gluon")
    operands, arguments = ragged_case({**FUSED, **BY_PAGE}[case], torch.float16)

    def asked(*_):
        raise AssertionError("the host asks for a value that is on the device")

    with use_backend("triton"):
        ragged_attention(*operands, **arguments)
        for name in ("item", "tolist", "__int__", "__bool__", "__index__", "__float__"):
            monkeypatch.setattr(torch.Tensor, name, asked)
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("error")
        try:
            ragged_attention(*operands, **arguments)
        finally:
            if ON_GPU:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("page", [16, 64])
def test_no_lengths_exceed_the_tiles_that_the_host_provides(page):
    from hf_kvcache.kernels.ragged_attention.triton_kernel import MAX_TILE, tiling

    torch.manual_seed(page)
    for _ in range(50):
        scale = int(10 ** (1 + 3 * torch.rand(()).item()))
        lengths = torch.randint(0, scale, (4, 8)).mul(torch.rand(4, 8) > 0.3)
        pages = -(-lengths // page)
        rows, n_tiles = tiling(int(pages.sum()) * page, int(pages.max()) * page, 32, 1, torch.device("cpu"))
        assert rows % 128 == 0 and rows <= MAX_TILE
        assert int((-(-lengths // rows)).sum()) <= n_tiles <= int(pages.sum()) * page // rows + 32


@runs_kernels
def test_what_the_kernels_cannot_do_is_said():
    def refused(case, reason):
        operands, arguments = ragged_case(case, torch.float32)
        with use_backend("triton"), pytest.raises(BackendUnavailable, match=reason):
            ragged_attention(*operands, **arguments)

    refused((16, 64, 1, 1, [[5]], {"bits": 3}, {"bits": 3}, None), "3 bits")
    refused((24, 64, 1, 1, [[5]], {}, {}, None), "pages of 24 rows")
    refused((16, 512, 1, 1, [[5]], {}, {}, None), "above 256")
