"""Pages and the ragged store: the same rows as lists of lists would hold, and no byte more than pages take."""

from functools import partial

import pytest
import torch

import hf_kvcache as kv
from hf_kvcache.stores import PagedBuffer, RaggedStore
from hf_kvcache.transfers import Landing

B, H, D = 2, 3, 5


def new_rows(n, seed, batch=B):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, H, n, D, generator=generator)
    return {"x": x, "n": torch.arange(batch * H * n, dtype=torch.int32).view(batch, H, n) + 1000 * seed}


def mask(n, seed, share, batch=B):
    return torch.rand(batch, H, n, generator=torch.Generator().manual_seed(seed)) < share


class Lists:
    """What a `PagedBuffer` shall be, row by row."""

    def __init__(self):
        self.rows = [[[] for _ in range(H)] for _ in range(B)]

    def heads(self):
        return [(b, h) for b in range(len(self.rows)) for h in range(H)]

    def append(self, rows, is_kept=None):
        for b, h in self.heads():
            for i in range(rows["x"].shape[2]):
                if is_kept is None or is_kept[b, h, i]:
                    self.rows[b][h].append((rows["x"][b, h, i], rows["n"][b, h, i].item()))

    def keep(self, is_kept):
        for b, h in self.heads():
            self.rows[b][h] = [row for row, stays in zip(self.rows[b][h], is_kept[b, h]) if stays]

    def truncate_by(self, n):
        for b, h in self.heads():
            self.rows[b][h] = self.rows[b][h][: max(len(self.rows[b][h]) - n, 0)]


def assert_same(paged, lists):
    counts = [[len(head) for head in row] for row in lists.rows]
    assert paged.counts.tolist() == paged.lengths.tolist() == counts
    if not paged.n_tokens:
        return
    x, n = paged.read("x", fill=7), paged.read("n", fill=-1)
    for b, h in lists.heads():
        own = lists.rows[b][h]
        assert n[b, h, : len(own)].tolist() == [number for _, number in own]
        assert (n[b, h, len(own) :] == -1).all() and (x[b, h, len(own) :] == 7).all()
        if own:
            assert torch.equal(x[b, h, : len(own)], torch.stack([row for row, _ in own]))


def assert_pages_are_owned_once(paged):
    """Every page of the pool but the first belongs to one head, or is free."""
    used = [
        page
        for own, count in zip(paged.table.flatten(0, 1).tolist(), paged.counts.flatten().tolist())
        for page in own[: -(-count // paged.page)]
    ]
    assert sorted(used + paged.free.tolist()) == list(range(1, paged.n_pages))
    return len(used)


@pytest.mark.parametrize("page", [16, 4, 1])
@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_of_operations_is_that_of_lists(page, seed):
    paged, lists = PagedBuffer(["x", "n"], page), Lists()
    pick = torch.Generator().manual_seed(seed)
    for step in range(30):
        what = int(torch.randint(5, (), generator=pick))
        n = int(torch.randint(1, 3 * page + 2, (), generator=pick))
        if what == 0 or paged.table is None:
            rows, is_kept = new_rows(n, 100 * seed + step, len(lists.rows)), None
            if n % 2:
                is_kept = mask(n, step, 0.6, len(lists.rows))
            paged.append(rows, is_kept)
            lists.append(rows, is_kept)
        elif what in (1, 2):
            is_kept = mask(paged.n_tokens, step, 0.7, len(lists.rows))
            paged.keep(is_kept)
            lists.keep(is_kept)
        elif what == 3:
            paged.truncate_by(n)
            lists.truncate_by(n)
        else:
            order = torch.tensor([1, 0, 0] if len(lists.rows) == 2 else [2, 0])
            paged.map_batch(partial(torch.index_select, dim=0, index=order))
            lists.rows = [[list(head) for head in lists.rows[b]] for b in order.tolist()]
        assert_same(paged, lists)
        n_used = assert_pages_are_owned_once(paged)
        assert n_used == sum(-(-len(head) // page) for row in lists.rows for head in row)


@pytest.mark.parametrize("page", [16, 4])
@pytest.mark.parametrize("seed", range(6))
def test_rows_are_the_same_where_nobody_waits_for_lengths(page, seed, monkeypatch):
    """As on a device: lengths arrive at some time, or never; until then there are pages for all that there may be."""
    pick = torch.Generator().manual_seed(seed)
    monkeypatch.setattr(PagedBuffer, "is_at_hand", False)
    monkeypatch.setattr(Landing, "has_arrived", property(lambda self: torch.rand((), generator=pick) < 0.3))
    paged, lists, n_freed = PagedBuffer(["x", "n"], page), Lists(), 0
    for step in range(40):
        n = int(torch.randint(1, page + 2, (), generator=pick))
        rows, is_kept = new_rows(n, 100 * seed + step), mask(n, step, 0.8) if step % 2 else None
        before = paged.counts.sum()
        paged.append(rows, is_kept, may_wait=False)
        lists.append(rows, is_kept)
        n_freed += paged.counts.sum() < before
        if step % 3 == 2:
            is_kept = mask(paged.n_tokens, step, 0.5)
            paged.keep(is_kept, may_wait=False)
            lists.keep(is_kept)
        assert (paged.counts >= paged.lengths).all() and paged.is_estimate == (step > 0)
        counts = [[len(head) for head in row] for row in lists.rows]
        assert paged.lengths.tolist() == counts
        read = paged.read("n", fill=-1)
        for b, h in lists.heads():
            assert read[b, h, : counts[b][h]].tolist() == [number for _, number in lists.rows[b][h]]
        assert_pages_are_owned_once(paged)
    assert n_freed, "no page came back without a look"
    paged.look()
    assert_same(paged, lists)
    assert_pages_are_owned_once(paged)


@pytest.mark.parametrize("n_first", [0, 40])
def test_without_memory_pages_stay_as_they_were(n_first, monkeypatch):
    paged, lists = PagedBuffer(["x", "n"], 4), Lists()
    rows = new_rows(n_first or 1, 0)
    paged.append(rows)
    lists.append(rows)
    empty, asked = torch.empty, []

    def short(*args, **options):
        asked.append(args)
        if len(asked) == 2:
            raise torch.OutOfMemoryError("the second of two tensors does not fit")
        return empty(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", short)
        with pytest.raises(torch.OutOfMemoryError):
            paged.append(new_rows(400, 1))
    assert len(asked) == 2
    assert_same(paged, lists)
    assert_pages_are_owned_once(paged)
    rows = new_rows(400, 2)
    paged.append(rows)
    lists.append(rows)
    assert_same(paged, lists)


def test_restored_from_its_views():
    paged, again = PagedBuffer(["x", "n"], 4), PagedBuffer(["x", "n"], 4)
    paged.append(new_rows(23, 0), mask(23, 0, 0.5))
    paged.keep(mask(paged.n_tokens, 1, 0.8))
    again.restore(paged.views(), paged.n_tokens)
    assert torch.equal(again.read("x"), paged.read("x")) and again.counts.equal(paged.counts)
    # and goes on
    rows = new_rows(9, 3)
    for buffer in (paged, again):
        buffer.append(rows)
    assert torch.equal(again.read("n"), paged.read("n"))


def test_garbage_behind_the_end_of_a_head_is_never_read():
    paged = PagedBuffer(["x", "n"], 4)
    paged.append(new_rows(13, 0), mask(13, 0, 0.5))
    wanted = paged.read("x")
    used = torch.zeros(paged.n_pages * 4, dtype=torch.bool)
    used[paged._address(None)[paged.is_row]] = True
    paged._flat("x")[~used] = float("nan")
    assert torch.equal(paged.read("x"), wanted)
    paged.keep(mask(paged.n_tokens, 1, 0.5))
    assert paged.read("x").isfinite().all()


def test_bytes_fall_with_eviction_and_pages_are_used_again():
    paged = PagedBuffer(["x", "n"], 16)
    paged.append(new_rows(1600, 0))
    full = paged.nbytes
    paged.keep(mask(1600, 0, 0.1))
    row = D * 4 + 4
    assert paged.nbytes < full / 4
    # a long run with eviction does not grow
    sizes = []
    for step in range(40):
        paged.append(new_rows(64, step))
        is_kept = torch.zeros(B, H, paged.n_tokens, dtype=torch.bool)
        is_kept[..., -160:] = True
        paged.keep(is_kept)
        sizes.append(paged.nbytes)
    assert max(sizes[5:]) <= 2 * B * H * 240 * row
    assert sizes[-1] <= max(sizes[5:15])


# -- the store -----------------------------------------------------------------------------------------------------


def rows(n=150, seed=0, batch=2, heads=2, width=32):
    return torch.randn(2, batch, heads, n, width, generator=torch.Generator().manual_seed(seed)).unbind(0)


CODECS = {
    "dense": None,
    "8bit": kv.Quantize(8, axis="token"),
    "4bit-rotate": kv.Quantize(4, axis="token", rotate=True),
    "bitmap": kv.Sparse(0.5),
    "index-8bit": kv.Sparse(0.5, layout="index") >> kv.Quantize(8, axis="token"),
}


def store(codec=None, window=8, page=16):
    sides = (None, None) if codec is None else (codec.for_side("k"), codec.for_side("v"))
    return RaggedStore(*sides, window=window, page=page, tracked={"position": torch.int32})


def feed(held, k, v, start=0):
    held.append(k, v)
    held.dense["position"][:, :, -k.shape[2] :] = torch.arange(start, start + k.shape[2], dtype=torch.int32)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_rows_come_back_as_the_codec_makes_them(codec):
    k, v = rows()
    held = store(codec)
    feed(held, k, v)
    is_kept = torch.rand(2, 2, 150, generator=torch.Generator().manual_seed(3)) < torch.tensor([0.1, 0.9]).view(1, 2, 1)
    held.keep(is_kept)
    is_kept[..., -8:] = True
    positions = held.positions
    parts = [torch.cat(side, 2) for side in zip(*held.blocks(16))]
    assert torch.equal(torch.cat([k for (k,) in held.blocks(16, "k")], 2), parts[0])
    codec = codec or kv.Dense()
    for x, ours, side in zip((k, v), parts, "kv"):
        own = codec.for_side(side)
        through = own.decode(own.encode(x), torch.float32, 32)
        through[:, :, -8:] = x[:, :, -8:]
        for b in range(2):
            for h in range(2):
                where = is_kept[b, h].nonzero()[:, 0]
                is_row = positions[b, h] >= 0
                assert positions[b, h][is_row].tolist() == where.tolist()
                assert torch.allclose(ours[b, h][is_row], through[b, h, where], atol=1e-6)
                assert (ours[b, h][~is_row] == 0).all()


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_bytes_are_those_of_the_pages(codec):
    k, v = rows(1000)
    held = store(codec, page=16)
    feed(held, k, v)
    is_kept = torch.zeros(2, 2, 1000, dtype=torch.bool)
    for i, n in enumerate((10, 100, 200, 900)):
        is_kept.view(4, 1000)[i, :n] = True
    held.keep(is_kept)
    n_pages = sum(-(-n // 16) for n in (10, 100, 200, 900))
    codec = codec or kv.Dense()
    row = sum(codec.for_side(side).nbytes_per_token(32, 4) for side in "kv") + 4
    assert held.packed.n_rows == 1210
    assert held.packed.n_pages <= n_pages * 17 / 16 + 3
    table = 4 * (held.packed.table.numel() + held.packed.free.numel() + held.packed.lengths.numel())
    table += held.packed.counts.untyped_storage().nbytes()
    assert held.packed.nbytes == held.packed.n_pages * 16 * row + table
    assert held.nbytes == held.packed.nbytes + held.dense.nbytes


def test_crop_brings_rows_back_from_the_pages():
    k, v = rows()
    held = store()
    feed(held, k, v)
    held.pack()
    assert held.packed.n_tokens >= 128 and held.dense.n_tokens < 24
    held.crop(40)
    assert held.n_kept == 110
    assert torch.equal(held.logical_rows()[0], k[:, :, :110])
    assert torch.equal(held.positions[1, 1], torch.arange(110, dtype=torch.int32))


@pytest.mark.parametrize("n", [5, 150])
def test_the_window_stays_out_of_the_pages(n):
    k, v = rows(n)
    held = store(window=8)
    feed(held, k, v)
    assert held.n_fixed == min(n, 8)
    held.keep(torch.ones(2, 2, n, dtype=torch.bool))
    assert held.dense.n_tokens == min(n, 8) and held.packed.n_tokens == n - min(n, 8)


def test_unequal_heads_are_no_dense_tensor():
    k, v = rows()
    held = store()
    feed(held, k, v)
    is_kept = torch.ones(2, 2, 150, dtype=torch.bool)
    is_kept[0, 0, 3] = False
    held.keep(is_kept)
    with pytest.raises(ValueError, match="different numbers of rows"):
        held.logical_rows()


def test_padding_never_enters_a_page():
    k, v = rows()
    held = store()
    feed(held, k, v)
    held.dense["position"][1, :, :30] = -1
    held.pack()
    assert held.packed.counts[1].tolist() == [n - 30 for n in held.packed.counts[0].tolist()]
