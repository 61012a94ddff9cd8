"""Locret: what is kept is what the paper's procedure keeps, chunk by chunk, and prompts of any length fit."""

import copy
from functools import cache

import pytest
import torch
from cases import assert_close, generate, padded, prompt, replay, splits, tiny_model

import hf_kvcache as kv
from hf_kvcache.adapters import RetainingHeads, attach
from hf_kvcache.adapters.modules import attached_heads
from hf_kvcache.compat import cache_argument

KNOBS = dict(n_sink=0, local=6)


@cache
def model_with_heads(arch="llama", implementation="hf_kvcache"):
    model = copy.deepcopy(tiny_model(arch, implementation))
    heads = RetainingHeads.new(model, d_r=8)
    # as they are initialised scores are close to each other
    attach(model, RetainingHeads({i: (fc1 * 30, fc2 * 30) for i, (fc1, fc2) in heads.layers.items()}))
    return model


def without_repetition(batch, length):
    """Ids no two of which in a row are the same: in the first layer these would have the same score."""
    generator = torch.Generator().manual_seed(2)
    return torch.stack([3 + torch.randperm(125, generator=generator)[:length] for _ in range(batch)])


def procedure(scores, budget, local, sizes, stabilizers, final):
    """Kept positions of one head after chunks of these sizes, by the paper's procedure in plain Python.

    The tail is part of the budget, as here. `final` says whether the prompt is complete after the last chunk.
    """
    kept, start = [], 0
    for i, size in enumerate(sizes):
        kept += range(start, start + size)
        start += size
        is_last = final and i == len(sizes) - 1
        protected = set(kept[max(len(kept) - stabilizers, 0) :]) if not is_last else set()
        protected |= {p for p in kept if p >= start - local}
        ranked = sorted(kept, key=lambda p: (p in protected, scores[p]), reverse=True)
        kept = sorted(ranked[:budget])
    return kept


def own_scores(model, ids):
    """Scores of every layer `[B, Hkv, T]` from one dense forward pass."""
    found, hooks = {}, []
    for module in model.modules():
        if attached_heads(module) is not None:
            hooks.append(module.o_proj.register_forward_hook(_noting(module, found)))
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def _noting(module, found):
    def note(*args):
        found[module.layer_idx] = attached_heads(module).scores()

    return note


@pytest.mark.parametrize("stabilizers", [0, 5, 12])
@pytest.mark.parametrize("sizes", [[16] * 5, [7] * 11 + [3], [80]], ids=["16", "7", "whole"])
def test_first_layer_keeps_what_the_procedure_keeps(sizes, stabilizers):
    # later layers see what eviction has left, so their scores are their own
    model, ids = model_with_heads(), without_repetition(2, 81)
    scores = own_scores(model, ids)[0]
    cache = kv.LocretCache(budget=24, stabilizers=stabilizers, **KNOBS)
    replay(model, cache, ids[:, :80], sizes)
    # the last chunk waits for what comes
    assert cache.layers[0].store.n_kept == min(sizes[-1] + 24, 80)
    replay(model, cache, ids[:, 80:], [1])
    kept = cache.layers[0].store.positions
    for b in range(2):
        for h in range(2):
            expected = procedure(scores[b, h].tolist(), 24, 6, sizes, stabilizers, final=True)
            assert kept[b, h].tolist() == expected + [80]
    assert not torch.equal(kept[0, 0], kept[0, 1])


def test_drafts_to_verify_are_no_chunk_of_the_prompt():
    model, ids = model_with_heads(), without_repetition(1, 80)
    scores = own_scores(model, ids)[0]
    cache = kv.LocretCache(budget=24, stabilizers=12, **KNOBS)
    cache.activate_past_recording()
    replay(model, cache, ids, [80])
    replay(model, cache, prompt(1, 4), [4])
    kept = cache.layers[0].store.positions[0, 0].tolist()
    assert kept == procedure(scores[0, 0].tolist(), 24, 6, [80], 12, final=True) + list(range(80, 84))


def test_a_chunk_that_follows_is_not_the_end_of_the_prompt():
    model, ids = model_with_heads(), without_repetition(1, 80)
    scores = own_scores(model, ids)[0]
    cache = kv.LocretCache(budget=24, stabilizers=12, **KNOBS)
    replay(model, cache, ids, [40, 20, 20])
    kept = cache.layers[0].store.positions[0, 0].tolist()
    expected = procedure(scores[0, 0].tolist(), 24, 6, [40, 20], 12, final=False)
    assert kept == expected + list(range(60, 80))


@pytest.mark.parametrize("arch", ["llama", "qwen3", "phi3", "gemma2"])
def test_prefill_and_generate_equal_dynamic_cache_within_the_budget(arch):
    model, ids = model_with_heads(arch), prompt(2, 70)
    expected = generate(model, ids, None).sequences
    assert torch.equal(generate(model, ids, kv.LocretCache(budget=256)).sequences, expected)
    assert torch.equal(generate(model, ids, kv.LocretCache(budget=256), prefill_chunk_size=16).sequences, expected)
    cache = kv.LocretCache(budget=256, chunk=16)
    kv.prefill(model, ids, cache)
    assert cache.get_seq_length() == 69
    assert torch.equal(generate(model, ids, cache).sequences, expected)


@pytest.mark.parametrize("chunk", [1, 7, 16, 200])
def test_prefill_holds_budget_and_chunk_and_ends_as_the_procedure(chunk):
    model, ids = model_with_heads(), without_repetition(2, 121)
    cache, most, seen = kv.LocretCache(budget=24, chunk=chunk, stabilizers=12, **KNOBS), [], []

    def advance(n):
        most.append(max(layer.store.n_kept for layer in cache.layers))
        seen.append(n)

    kv.prefill(model, ids, cache, advance=advance)
    assert sum(seen) == 120 and max(most) <= 24
    scores = own_scores(model, ids)[0]
    # all but the tail in chunks, the end of which is final; then the tail
    sizes = splits(114, chunk)
    for h in range(2):
        before = procedure(scores[0, h].tolist(), 24, 6, sizes, 12, final=True)
        ranked = sorted(before, key=scores[0, h].tolist().__getitem__, reverse=True)
        assert cache.layers[0].store.positions[0, h].tolist() == sorted(ranked[:18]) + list(range(114, 120))
    out = generate(model, ids, cache).sequences
    assert out.shape == (2, 137) and cache.get_seq_length() == 136
    # decoding does not evict
    assert {layer.store.n_kept for layer in cache.layers} == {24 + 16}


def test_decoding_evicts_where_asked():
    model, ids = model_with_heads(), prompt(2, 60)
    cache = kv.LocretCache(budget=24, decode=True, interval=4, **KNOBS)
    generate(model, ids, cache, max_new_tokens=40)
    assert all(24 <= layer.store.n_kept < 24 + 4 for layer in cache.layers)
    # decoded tokens are scored like others
    assert all(layer.store.state("score").isfinite().all() for layer in cache.layers)


def test_second_turn_feeds_new_tokens_only():
    model, ids = model_with_heads(), prompt(1, 60)
    cache = kv.LocretCache(budget=24, chunk=16, **KNOBS)
    kv.prefill(model, ids, cache)
    first = generate(model, ids, cache, max_new_tokens=5).sequences
    more = torch.cat([first, prompt(1, 50, seed=4)], 1)
    seen = []
    kv.prefill(model, more, cache, advance=seen.append)
    assert sum(seen) == more.shape[1] - 1 - 64
    assert cache.get_seq_length() == more.shape[1] - 1
    # what was generated is not scored and outlives the prompt
    assert {*range(60, 64)} <= set(cache.layers[0].store.positions[0, 0].tolist())
    assert all(layer.store.n_kept == 24 for layer in cache.layers)
    generate(model, more, cache, max_new_tokens=3)


def test_generated_tokens_that_fill_the_budget_go_oldest_first():
    model, ids = model_with_heads(), prompt(1, 30)
    cache = kv.LocretCache(budget=24, chunk=16, **KNOBS)
    first = generate(model, ids, cache, max_new_tokens=50).sequences
    kv.prefill(model, torch.cat([first, prompt(1, 12, seed=4)], 1), cache)
    for head in cache.layers[0].store.positions[0]:
        assert head[head < 79].tolist() == list(range(79 - int((head < 79).sum()), 79))


def test_left_padded_batch_equals_its_rows():
    model, (ids, mask, rows) = model_with_heads(), padded([90, 61])
    together = kv.LocretCache(budget=24, stabilizers=8, **KNOBS)
    logits = replay(model, together, ids, [48, 16, 16, 10], mask)
    for i, row in enumerate(rows):
        n_pads = 90 - row.shape[1]
        alone = kv.LocretCache(budget=24, stabilizers=8, **KNOBS)
        expected = replay(model, alone, row, [48 - n_pads, 16, 16, 10])
        assert_close("logits", logits[i, n_pads:], expected[0], 1e-4)


@pytest.mark.parametrize("codec", [kv.Quantize(8, axis="token"), kv.Sparse(0.5)], ids=["8bit", "sparse"])
def test_survivors_are_encoded_once(codec, monkeypatch):
    model, ids, encoded = model_with_heads(), prompt(1, 240), []
    kind = type(codec)
    stock = kind.encode

    def counting(self, x, *args, **kwargs):
        encoded.append(x.shape[2])
        return stock(self, x, *args, **kwargs)

    cache = kv.LocretCache(budget=90, chunk=48, codec=codec, window=8, n_sink=0, local=6)
    monkeypatch.setattr(kind, "encode", counting)
    kv.prefill(model, ids, cache)
    # both sides of two layers try the codec on 32 rows; then no row is encoded twice, and the newest not at all
    assert sum(encoded) <= 4 * (32 + 239 - 8)
    assert all(layer.store.n_packed and layer.store.n_kept == 90 for layer in cache.layers)
    assert cache.nbytes < kv_dense_bytes(model, ids)


def kv_dense_bytes(model, ids):
    dense = kv.KVCache()
    model(ids[:, :90], **cache_argument(dense))
    return dense.nbytes


def test_a_model_without_heads_is_told():
    with pytest.raises(ValueError, match="carries no retaining heads"):
        generate(tiny_model(), prompt(1, 20), kv.LocretCache(budget=256))


def test_mistakes():
    with pytest.raises(ValueError, match="chunk=0"):
        kv.LocretCache(budget=256, chunk=0)
    with pytest.raises(ValueError, match="stabilizers=-1"):
        kv.LocretCache(budget=256, stabilizers=-1)
    model, ids = model_with_heads(), prompt(1, 20)
    cache = kv.LocretCache(budget=256)
    kv.prefill(model, ids, cache)
    with pytest.raises(ValueError, match="holds 19 tokens already"):
        kv.prefill(model, ids[:, :10], cache)
