"""The store alone: the same rows by any route give the same bytes, and growing is cheap."""

import pytest
import torch
from cases import assert_close, splits

import hf_kvcache as kv
from hf_kvcache.stores import RowBuffer, UniformStore

T = 150


def rows(n=T, seed=0, batch=2, heads=2, width=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, heads, n, width, generator=generator).to(dtype).unbind(0)


def codecs(bits=4, **options):
    codec = kv.Quantize(bits, **options)
    return codec.for_side("k"), codec.for_side("v")


STORES = {
    "dense": lambda: UniformStore(window=8),
    "dense-codec": lambda: UniformStore(kv.Dense(), kv.Dense(), window=8),
    "4bit": lambda: UniformStore(*codecs(), window=16),
    "4bit-window0": lambda: UniformStore(*codecs(), window=0),
    "2bit-sink5": lambda: UniformStore(*codecs(2), window=16, n_sink=5),
    "3bit-rotate": lambda: UniformStore(*codecs(3, rotate=True), window=16),
    "8bit-token": lambda: UniformStore(*codecs(8, axis="token"), window=16, tracked={"position": torch.int32}),
    "4bit-max_length": lambda: UniformStore(*codecs(), window=16, max_length=T),
}


def feed(store, k, v, sizes):
    start = 0
    for size in sizes:
        store.append(k[:, :, start : start + size], v[:, :, start : start + size])
        store.pack()
        start += size
    return store


def in_use(store):
    return {(b, name): t for b, buffer in store.buffers().items() for name, t in buffer.views().items()}


@pytest.mark.parametrize("size", [1, 7, 40])
@pytest.mark.parametrize("name", STORES)
def test_any_split_gives_the_same_bytes(name, size):
    k, v = rows()
    once, pieces = feed(STORES[name](), k, v, [T]), feed(STORES[name](), k, v, splits(T, size))
    assert in_use(once).keys() == in_use(pieces).keys()
    for where, t in in_use(once).items():
        assert torch.equal(t, in_use(pieces)[where]), where


@pytest.mark.parametrize("name", STORES)
def test_rows_come_back_in_order(name):
    k, v = rows()
    store = feed(STORES[name](), k, v, [90] + [1] * (T - 90))
    assert store.n_kept == T
    got_k, got_v = store.logical_rows()
    tolerance = 1e-6 if "dense" in name else {"2": 1.5, "3": 1.0, "4": 0.5, "8": 0.05}[name[0]]
    assert_close("keys", got_k, k, tolerance)
    assert_close("values", got_v, v, tolerance)
    # sinks and the window are exact
    for got, sent in ((got_k, k), (got_v, v)):
        assert torch.equal(got[:, :, : store.n_sink], sent[:, :, : store.n_sink])
        assert torch.equal(got[:, :, T - store.window :], sent[:, :, T - store.window :])


@pytest.mark.parametrize("name", STORES)
def test_blocks_and_masks_are_in_view_order(name):
    k, v = rows()
    store = feed(STORES[name](), k, v, [T])
    for size in (1, 33, 64, 1000):
        blocks = list(store.blocks(size))
        assert all(b.shape[2] <= max(size, store.packed.unit) for b, _ in blocks)
        viewed = torch.cat([b for b, _ in blocks], 2)  # [B, H, N, D]
        order = store.to_view_order(torch.arange(T).expand(1, 1, 1, T))[0, 0, 0]
        assert_close("rows", viewed, store.logical_rows()[0][:, :, order], 1e-6)
        assert torch.equal(torch.cat([k for (k,) in store.blocks(size, "k")], 2), viewed)


def test_state_of_new_rows_is_tensors_or_one_number():
    x = torch.randn(2, 3, 4, 8)
    store = UniformStore(tracked={"position": torch.int32, "mass": torch.float32})
    store.append(x, x, {"position": torch.arange(4)})
    store.append(x[:, :, :1], x[:, :, :1], {"position": 4, "mass": 0.5})
    assert torch.equal(store.positions, torch.arange(5, dtype=torch.int32).expand(2, 3, 5))
    assert torch.equal(store.state("mass"), torch.tensor([0, 0, 0, 0, 0.5]).expand(2, 3, 5))


def test_appending_does_not_copy_the_cache():
    # 200 tokens one at a time: buffers move a few times, not once per token
    for make in (lambda: UniformStore(), lambda: UniformStore(*codecs(), window=16)):
        k, v = rows(1200)
        store, moves, before = feed(make(), k, v, [1000]), 0, None
        for t in range(1000, 1200):
            store.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
            store.pack()
            pointers = [t.data_ptr() for buffer in store.buffers().values() for t in buffer.tensors.values()]
            moves += before is not None and pointers != before
            before = pointers
        assert moves <= 5, moves


def test_max_length_makes_room_once():
    for make in (lambda: UniformStore(max_length=400), lambda: UniformStore(*codecs(), window=16, max_length=400)):
        k, v = rows(400)
        store = feed(make(), k, v, [100])
        pointers = {name: t.data_ptr() for b in store.buffers().values() for name, t in b.tensors.items()}
        feed(store, k[:, :, 100:], v[:, :, 100:], [1] * 300)
        after = {name: t.data_ptr() for b in store.buffers().values() for name, t in b.tensors.items()}
        assert pointers == after


@pytest.mark.parametrize("n", [1, 20, 60, 149])
@pytest.mark.parametrize("name", STORES)
def test_crop(name, n):
    k, v = rows()
    store = feed(STORES[name](), k, v, [T])
    before = store.logical_rows()
    store.crop(n)
    assert store.n_kept == T - n
    for ours, theirs in zip(store.logical_rows(), before):
        assert_close("rows", ours, theirs[:, :, : T - n], 1e-5)


def test_keep_frees_what_it_drops():
    k, v = rows()
    store = UniformStore(tracked={"position": torch.int32})
    store.append(k, v)
    store.dense["position"].copy_(torch.arange(T))
    indices = torch.stack([torch.randperm(T)[:40].sort().values for _ in range(4)]).view(2, 2, 40)
    store.keep(indices)
    assert torch.equal(store.positions, indices.int())
    picked = indices[..., None].expand(2, 2, 40, 32)
    assert torch.equal(store.logical_rows()[0], k.gather(2, picked))
    assert torch.equal(store.logical_rows()[1], v.gather(2, picked))
    assert store.nbytes == 2 * 2 * 40 * (2 * 32 * 4 + 4)


def test_state_follows_packed_rows():
    k, v = rows()
    store = UniformStore(*codecs(4, axis="token"), window=16, tracked={"position": torch.int32})
    for t in range(T):
        store.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        store.dense["position"][:, :, -1] = t
        store.pack()
    assert store.n_packed == 128
    assert torch.equal(store.positions, torch.arange(T, dtype=torch.int32).expand(2, 2, T))
    keep = torch.cat([torch.arange(0, 128, 2), torch.arange(128, T)]).expand(2, 2, -1)
    store.keep(keep)
    assert torch.equal(store.positions, keep.int())
    assert_close("keys", store.logical_rows()[0], k[:, :, keep[0, 0]], 0.5)


def test_buffer_reports_its_storages():
    buffer = RowBuffer({"x": 1})
    base = torch.zeros(1, 1, 100, 4)
    buffer.append({"x": base[:, :, :10]}, 10)
    # adopted as it is: the whole storage is held
    assert buffer.nbytes == 1600
    buffer.copy_storage()
    assert buffer.nbytes == 160


def test_nothing_is_packed_below_min_length():
    store = UniformStore(kv.Sparse(0.5), kv.Sparse(0.5), window=8, min_length=100)
    x = torch.randn(1, 2, 90, 16)
    store.append(x, x.clone())
    store.pack()
    assert store.n_packed == 0
    for _ in range(10):
        store.append(x[:, :, :1], x[:, :, :1])
        store.pack()
    assert store.n_packed == 64 and store.n_kept == 100
