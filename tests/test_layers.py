"""Batch, crop and device operations of a filled cache, written once over the declared payloads."""

import copy

import pytest
import torch
from cases import (
    BY_ID,
    CASES,
    KNOBS,
    LOSSLESS,
    LOSSY,
    assert_close,
    prompt,
    replay,
    state,
    tiny_model,
)
from rooms import telling

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument

IDS = prompt(3, 70)
SIZES = [60] + [1] * 10


def filled(case, ids=IDS, sizes=SIZES):
    cache = case.make()
    replay(tiny_model(), cache, ids, sizes)
    return cache


def assert_close_state(ours, theirs):
    """As `assert_same_state` where rows of a batch went through other matrix products: rounding is allowed for."""
    ours, theirs = state(ours), state(theirs)
    assert ours.keys() == theirs.keys()
    for where, t in ours.items():
        assert t.shape == theirs[where].shape
        if t.dtype == torch.int16:
            # a rounding tie may move a code by one
            assert (t != theirs[where]).float().mean() < 0.02
        elif t.is_floating_point():
            assert_close(where, t, theirs[where], 2e-3)
        else:
            assert torch.equal(t, theirs[where])


@pytest.mark.parametrize("indices", telling([[2, 0], [1, 1, 0, 2]], [1, 1, 0, 2]), ids=["fewer", "more"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_batch_select_indices(case, indices):
    cache, rebuilt = filled(case), filled(case, IDS[indices])
    cache.batch_select_indices(torch.tensor(indices))
    assert_close_state(cache, rebuilt)
    assert cache.nbytes_dense == rebuilt.nbytes_dense
    tails = prompt(len(indices), 6, seed=5)
    ours, theirs = (replay(tiny_model(), c, tails, [3, 1, 1, 1]) for c in (cache, rebuilt))
    assert_close("logits", ours, theirs, 1e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reorder_is_a_permutation_of_every_payload(case):
    cache = filled(case)
    before = {where: t.clone() for where, t in state(cache).items()}
    order = torch.tensor([2, 2, 0])
    cache.reorder_cache(order)
    for where, t in state(cache).items():
        expected = before[where][order]
        # heads of different lengths are padded to the longest one left
        assert torch.equal(t, expected[:, :, : t.shape[2]] if t.dim() > 2 else expected)


@pytest.mark.parametrize("n", [1, 9, 30, 69])
@pytest.mark.parametrize("case", LOSSLESS, ids=str)
def test_crop_equals_a_rebuilt_cache(case, n):
    cache = filled(case)
    if case.id.startswith("streaming") or case.id.startswith("keydiff"):
        assert not cache.is_croppable
    cache.crop(-n)
    assert cache.get_seq_length() == 70 - n
    tail = prompt(3, 5, seed=6)
    expected = tiny_model()(torch.cat([IDS[:, : 70 - n], tail], 1), use_cache=False).logits[:, -5:]
    assert_close("logits", replay(tiny_model(), cache, tail, [3, 2]), expected, 1e-5)


@pytest.mark.parametrize("n", telling([1, 9, 40], 9))
@pytest.mark.parametrize("case", [case for case in LOSSY if not case.evicts], ids=str)
def test_crop_of_packed_rows(case, n):
    # rows that were packed come back decoded: what remains reads as before
    cache = filled(case)
    before = [layer.store.logical_rows() for layer in cache.layers]
    cache.crop(torch.tensor(-n))
    for layer, (k, v) in zip(cache.layers, before):
        assert layer.store.n_kept == layer.tokens_seen == 70 - n
        for ours, theirs in zip(layer.store.logical_rows(), (k, v)):
            assert_close("rows", ours, theirs[:, :, : 70 - n], 1e-5)
    # and packing goes on
    replay(tiny_model(), cache, prompt(3, 50, seed=6), [1] * 50)
    for layer in cache.layers:
        assert layer.store.dense.n_tokens < layer.store.window + layer.store.n_sink + layer.store.step


@pytest.mark.parametrize("case", CASES, ids=str)
def test_crop_everything(case):
    cache = filled(case)
    if case.evicts:
        with pytest.raises(ValueError, match="cannot crop 70 tokens.*raise n_recent"):
            cache.crop(-70)
        return
    cache.crop(-70)
    assert cache.get_seq_length() == 0 and cache.nbytes == 0


def test_crop_within_the_recent_tokens_of_an_evicting_cache():
    # the prompt of 60 leaves 0, 1 and 38 ... 59; then 54 ... 59 are cropped and fed again
    cache, ids = kv.EvictionCache("streaming", budget=24, **KNOBS), IDS[:, :60]
    replay(tiny_model(), cache, ids, [60])
    cache.crop(-6)
    again = replay(tiny_model(), cache, ids[:, 54:], [1] * 6)
    visible = torch.ones(60, 60, dtype=torch.bool).tril()
    visible[54:, 2:38] = False
    reference = tiny_model("llama", "sdpa")(ids, attention_mask=visible.expand(3, 1, 60, 60), use_cache=False).logits
    assert_close("logits", again, reference[:, 54:], 1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_offload_and_prefetch_move_every_payload(case):
    cache = filled(case)
    before = {where: t.clone() for where, t in state(cache).items()}
    for i, layer in enumerate(cache.layers):
        cache.offload(i, only_non_sliding=False)
        own = {where: t for where, t in state(cache).items() if where[0] == i}
        assert own and all(t.device.type == "cpu" and torch.equal(t, before[where]) for where, t in own.items())
        # "meta" stands for the GPU: whatever does not move is found
        layer.device = torch.device("meta")
        layer.prefetch()
        assert {t.device.type for where, t in state(cache).items() if where[0] == i} == {"meta"}


def test_waiting_eviction_follows_the_batch():
    # queries kept for an eviction that waits for `crop` are a payload too
    cache = kv.EvictionCache("keydiff", budget=24, **KNOBS)
    cache.activate_past_recording()
    tiny_model()(IDS, **cache_argument(cache))
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.layers[0]._is_unsettled
    cache.crop(-3)
    alone = kv.EvictionCache("keydiff", budget=24, **KNOBS)
    tiny_model()(IDS[1:2, :67], **cache_argument(alone))
    for ours, theirs in zip(cache.layers, alone.layers):
        assert torch.equal(ours.store.positions, theirs.store.positions)


@pytest.mark.parametrize("case", ["dense", "quant4-window8", "keydiff-budget24"])
def test_report(case):
    cache = filled(BY_ID[case])
    rows = cache.report()
    assert [row["layer"] for row in rows] == [0, 1]
    assert all(row["class"] == "KVLayer" and row["tokens_seen"] == 70 for row in rows)
    assert sum(row["nbytes"] for row in rows) == cache.nbytes
    assert cache.compression_ratio == cache.nbytes_dense / cache.nbytes
    assert str(cache.nbytes) in repr(cache)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_end_at_what_is_cached(case):
    model, cache = copy.deepcopy(tiny_model()).requires_grad_(True), case.make()
    for start, n in ((0, 60), (60, 1), (61, 1), (62, 5)):
        model.zero_grad()
        model(IDS[:, start : start + n], **cache_argument(cache)).logits.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert model.lm_head.weight.grad.any()
        assert not any(t.requires_grad for t in state(cache).values())
