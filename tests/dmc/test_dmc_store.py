"""Rows that exist: pages, bytes, codecs, dtypes."""

import pytest
import torch
from cases import state
from tiny_retrofits import CACHES, batch, feed, lengths, retrofitted, whole
from transformers import DynamicCache

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument
from hf_kvcache.stores import PagedBuffer

METHODS = ["dmc", "dms"]


def in_use(packed):
    """Pages of a buffer that heads own; every page is owned once or free, but for the first one."""
    owned = []
    for b, row in enumerate(packed.lengths.tolist()):
        for h, n in enumerate(row):
            owned += packed.table[b, h, : -(-n // packed.page)].tolist()
    assert sorted(owned + packed.free.tolist()) == list(range(1, packed.n_pages))
    return len(owned)


def promised(layer, window, merges):
    """Bytes that a layer with dense rows needs, from the sizes of what it has to hold."""
    packed = layer.store.packed
    B, H, D, size = layer.batch_size, layer.n_kv_heads, layer.head_dim, layer.dtype.itemsize
    pages = packed.n_pages * packed.page * 2 * D * size
    # lengths are on the device and where Python can look
    index = 4 * (B * H * packed.table.shape[2] + B * H + packed.free.numel()) + 8 * B * H
    ring = 4 * B * H * (1 if merges else window + 1)
    # float32 where a mean is summed up for long
    member = max(size, 4) if not window else size
    segment = B * H * max(window, 1) * (2 * D * member + max(size, 4)) if merges else 0
    # so are the beginnings, on the device for every head
    first = 4 * B * H + 8 * B
    return pages + index + ring + segment + first


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method, window", [("dmc", 12), ("dmc", 0), ("dms", 20)])
def test_bytes(method, window, dtype):
    model = retrofitted(method, n_layers=2, window=window, bias=[0.6, 0.3], dtype=dtype)
    inputs, cache, dense = batch([400, 300]), CACHES[method](), DynamicCache()
    feed(model, cache, *inputs, [350] + [1] * 50)
    rows = int((-(-lengths(cache) // 32)).sum())
    assert sum(in_use(layer.store.packed) for layer in cache.layers) == rows
    for layer in cache.layers:
        packed = layer.store.packed
        assert packed.n_pages <= in_use(packed) * 17 / 16 + 8
    assert cache.nbytes == sum(promised(layer, window, method == "dmc") for layer in cache.layers)
    for child in (layer.self_attn.kv_dmc for layer in model.model.layers):
        child.compresses = False
    feed(model, dense, *inputs, [400])
    held = sum(t.untyped_storage().nbytes() for layer in dense.layers for t in (layer.keys, layer.values))
    assert cache.nbytes_dense == held
    assert cache.nbytes < 0.7 * held


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * 40, [33, 1, 1, 5]], ids=["decoded", "chunks"])
@pytest.mark.parametrize("window", [3, 0])
def test_merging_everything_leaves_one_row(window, sizes):
    model = retrofitted(window=window, decision="linear", bias=[50.0])
    inputs, cache = batch([40, 20]), CACHES["dmc"]()
    logits = feed(model, cache, *inputs, sizes)
    assert lengths(cache).tolist() == [[[1, 1], [1, 1]]]
    assert (logits - whole(model, *inputs))[inputs[1].bool()].abs().max() <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 40])
def test_dropping_everything_leaves_the_window(window):
    model = retrofitted("dms", window=window, decision="linear", bias=[50.0])
    ids, mask, positions = batch([280, 220])
    cache, seen = CACHES["dms"](), []
    feed(model, cache, ids[:, :100], mask[:, :100], positions[:, :100], [100])
    packed = cache.layers[0].store.packed
    after_prompt = in_use(packed)
    for t in range(100, 280):
        step = slice(t, t + 1)
        feed_mask = mask[:, : t + 1]
        model(ids[:, step], attention_mask=feed_mask, position_ids=positions[:, step], **cache_argument(cache))
        seen.append((packed.n_pages, cache.nbytes, lengths(cache).amax().item()))
    assert set(seen) == {seen[-1]}
    assert seen[-1][2] == window + 1 and lengths(cache).unique().tolist() == [window + 1]
    assert in_use(packed) == after_prompt == 4 * -(-(window + 1) // 32)


@torch.no_grad()
def test_rows_are_used_again_where_they_are():
    # keys of tokens that stay do not move while others go
    model = retrofitted("dms", window=4, bias=[0.3, 0.1])
    inputs, cache = batch([60]), CACHES["dms"]()
    ids, mask, positions = inputs
    feed(model, cache, ids[:, :20], mask[:, :20], positions[:, :20], [20])
    packed, moved = cache.layers[0].store.packed, 0
    for t in range(20, 60):
        before, counts = packed.read("k.rows").clone(), packed.lengths.clone()
        step = slice(t, t + 1)
        model(ids[:, step], attention_mask=mask[:, : t + 1], position_ids=positions[:, step], **cache_argument(cache))
        after = packed.read("k.rows")[:, :, : before.shape[2]]
        changed = (after != before).any(-1) & (torch.arange(before.shape[2]) < counts.unsqueeze(-1))
        grown = packed.lengths - counts
        # one row per head is new: over an old one, or behind the end
        assert (changed.sum(-1) + grown == 1).all()
        moved += int(changed.sum())
    assert moved > 5


# -- lengths that are estimates ------------------------------------------------------------------------------------


def estimated(n_steps=100, page=4):
    """Pages into which heads were fed one row at a time, some of which they did not need, without a look."""
    paged, generator = PagedBuffer(["x"], page), torch.Generator().manual_seed(0)
    paged.allocate(2, 2, "cpu")
    lists = [[[] for _ in range(2)] for _ in range(2)]
    for step in range(n_steps):
        rows = {"x": torch.full((2, 2, 1, 3), float(step))}
        paged.make_room(rows)
        grows = torch.rand(2, 2, generator=generator) < torch.tensor([[0.1, 0.9], [0.5, 0.3]])
        slot = torch.where(grows | (paged.lengths == 0), paged.lengths, paged.lengths - 1)
        paged.lengths += (slot == paged.lengths).int()
        paged.put(rows, slot)
        for b in range(2):
            for h in range(2):
                lists[b][h][int(slot[b, h]) :] = [float(step)]
        if step % 32 == 31:
            paged.look()
    return paged, lists


def held(paged):
    x = paged.read("x")[..., 0]
    return [[x[b, h, :n].tolist() for h, n in enumerate(row)] for b, row in enumerate(paged.lengths.tolist())]


def test_a_look_takes_pages_back():
    paged, lists = estimated()
    assert held(paged) == lists
    assert paged.counts.sum() > paged.lengths.sum()
    paged.look()
    assert paged.counts.equal(paged.lengths.long()) and held(paged) == lists
    assert in_use(paged) == sum(-(-len(head) // 4) for row in lists for head in row)


@pytest.mark.parametrize("what", ["views", "map_batch", "append", "truncate_by", "keep"])
def test_estimates_are_no_rows(what):
    paged, lists = estimated()
    if what == "views":
        again = PagedBuffer(["x"], 4)
        again.restore(paged.views(), paged.n_tokens)
        paged = again
    elif what == "map_batch":
        paged.map_batch(lambda t: t.index_select(0, torch.tensor([1, 0, 0])))
        lists = [lists[i] for i in (1, 0, 0)]
    elif what == "append":
        paged.append({"x": torch.full((2, 2, 2, 3), -1.0)})
        lists = [[head + [-1.0, -1.0] for head in row] for row in lists]
    elif what == "truncate_by":
        paged.truncate_by(3)
        lists = [[head[:-3] for head in row] for row in lists]
    else:
        is_kept = torch.arange(paged.n_tokens).expand(2, 2, -1) % 3 == 0
        paged.keep(is_kept)
        lists = [[head[::3] for head in row] for row in lists]
    assert held(paged) == lists
    assert in_use(paged) == sum(-(-len(head) // 4) for row in lists for head in row)
    assert paged.counts.equal(paged.lengths.long())


# -- codecs --------------------------------------------------------------------------------------------------------

CODECS = {
    "quant8": (lambda: kv.Quantize(8, axis="token"), 0.02, 0.5),
    "quant4": (lambda: kv.Quantize(4, axis="token"), 0.2, 0.4),
    "sparse0.5": (lambda: kv.Sparse(0.5), 0.7, 0.75),
    "sparse0.5-quant8": (lambda: kv.Sparse(0.5) >> kv.Quantize(8, axis="token"), 0.7, 0.55),
    "quant8k-densev": (lambda: (kv.Quantize(8, axis="token"), kv.Dense()), 0.02, 0.9),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("method", METHODS)
def test_over_a_codec(method, name):
    make, tolerance, share = CODECS[name]
    model = retrofitted(method, n_layers=2, window=4, bias=[0.3, 0.1], dtype=torch.float32)
    inputs, plain, cache = batch([200, 150]), CACHES[method](), CACHES[method](codec=make())
    is_real = inputs[1].bool()
    dense = feed(model, plain, *inputs, [160] + [1] * 40)
    logits = feed(model, cache, *inputs, [160] + [1] * 40)
    # a prompt at once is exact; later tokens see what the codec makes of it
    error = logits - dense
    assert error[:, :160][is_real[:, :160]].abs().max() <= 1e-4
    assert 1e-4 < error[:, 161:].std() / dense[is_real].std() <= tolerance
    assert torch.equal(lengths(cache)[0], lengths(plain)[0])
    pages = [sum(t.nbytes for layer in c.layers for t in layer.store.packed.tensors.values()) for c in (cache, plain)]
    assert pages[0] < share * pages[1]
    # rows of a batch go their own ways
    before = state(cache)
    cache.batch_select_indices(torch.tensor([1, 1, 0]))
    after = state(cache)
    assert before.keys() == after.keys() and all(torch.equal(after[at], t[[1, 1, 0]]) for at, t in before.items())
    more = torch.full((3, 1), 7)
    mask = torch.cat([inputs[1][[1, 1, 0]], torch.ones(3, 1, dtype=torch.long)], 1)
    out = model(more, attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1, **cache_argument(cache)).logits
    again = CACHES[method](codec=make())
    feed(model, again, *(t[[1, 1, 0]] for t in inputs), [160] + [1] * 40)
    want = model(more, attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1, **cache_argument(again)).logits
    assert (out - want).abs().max() <= 1e-5
    assert torch.equal(lengths(cache), lengths(again))


@pytest.mark.parametrize("cache, name", [(kv.DMCCache, "DMC"), (kv.DMSCache, "DMS")])
@pytest.mark.parametrize(
    "codec, what",
    [
        (lambda: kv.Quantize(4), "axis='channel'|drops single tokens"),
        (lambda: kv.LowRank(8), "LowRank"),
        (lambda: kv.Sparse(0.5, axis="channel"), "channel|drops single tokens"),
    ],
    ids=["quantize-channel", "lowrank", "sparse-channel"],
)
def test_pairs_that_cannot_work(cache, name, codec, what):
    with pytest.raises(ValueError, match=what) as raised:
        cache(codec=codec())
    assert name in str(raised.value) and type(codec()).__name__ in str(raised.value)


@pytest.mark.parametrize(
    "knobs",
    [dict(rerotate_keys=True), dict(max_length=64), dict(n_sink=4), dict(min_length=64)],
    ids=lambda knobs: [*knobs][0],
)
def test_nothing_to_set_beside_the_decisions(knobs):
    with pytest.raises(ValueError, match="DMC.*" + next(iter(knobs)) + "|" + next(iter(knobs)) + ".*"):
        kv.KVCache(kv.DMC(), **knobs)


# -- dtypes --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("window", [12, 0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.08), (torch.float16, 0.01), (torch.float32, 1e-5)])
def test_other_dtypes(dtype, tolerance, window):
    # decisions by the exact model's, so that rounding has no say in them
    for method in METHODS:
        model = retrofitted(method, window=window or 3, decision="linear", bias=[0.3, 0.1], scale=1e4).to(dtype)
        inputs = batch([40, 21])
        is_real = inputs[1].bool()
        logits = whole(model, *inputs)
        assert logits.dtype == dtype
        for sizes in ([40], [20] + [1] * 20, [9, 1, 30]):
            cache = CACHES[method]()
            ours = feed(model, cache, *inputs, sizes)
            # a decision close to zero may turn where the projection rounds otherwise: none of these does
            assert (ours - logits)[is_real].abs().max() <= tolerance * logits[is_real].float().std()
            at_once = CACHES[method]()
            feed(model, at_once, *inputs, [40])
            assert torch.equal(lengths(cache), lengths(at_once))


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_equal_projections_are_equal_decisions(method):
    # in bfloat16, far below its grid: the very same hidden states, at once and one by one
    model = retrofitted(method, window=4, dtype=torch.bfloat16, scale=100.0)
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    angles = model.model.rotary_emb(hidden, torch.arange(30).unsqueeze(0))
    # projections that sum nothing have one result, whatever the shape of the product
    for weight in (getattr(attention, f"{p}_proj").weight for p in "qkv"):
        weight.zero_()
        weight[torch.arange(len(weight)), torch.arange(len(weight)) % 32] = 1.25
    at_once, one_by_one = CACHES[method](), CACHES[method]()
    attention(hidden, angles, None, **cache_argument(at_once))
    decided = [attention.kv_dmc.call.alpha]
    for t in range(30):
        step = slice(t, t + 1)
        attention(hidden[:, step], tuple(a[:, step] for a in angles), None, **cache_argument(one_by_one))
        decided.append(attention.kv_dmc.call.alpha)
    assert torch.equal(decided[0], torch.cat(decided[1:], -1))
    assert torch.equal(lengths(at_once), lengths(one_by_one))
    assert 1 < lengths(at_once).min() and lengths(at_once).max() < 30
