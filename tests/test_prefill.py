"""Reading a prompt in chunks, for any cache, and putting the query first."""

import pytest
import torch
from cases import assert_close, generate, padded, prompt, tiny_model
from transformers import DynamicCache

import hf_kvcache as kv

CACHES = {
    "dynamic": DynamicCache,
    "dense": kv.KVCache,
    "quant8": lambda: kv.QuantCache(8, window=128),
    "snapkv": lambda: kv.EvictionCache("snapkv", budget=256),
    "adakv": lambda: kv.EvictionCache("adakv", budget=256),
}


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_generation_goes_on_as_without(make, chunk):
    model, ids = tiny_model(), prompt(2, 70)
    cache, seen = make(), []
    kv.prefill(model, ids, cache, chunk=chunk, advance=seen.append)
    assert sum(seen) == 69 == cache.get_seq_length() and max(seen) <= chunk
    assert torch.equal(generate(model, ids, cache).sequences, generate(model, ids).sequences)


def test_left_padding():
    model, (ids, mask, rows) = tiny_model(), padded([70, 41])
    cache = kv.KVCache()
    kv.prefill(model, ids, cache, attention_mask=mask, chunk=16)
    out = generate(model, ids, cache, attention_mask=mask)
    for i, row in enumerate(rows):
        assert_close("logits", torch.stack(out.logits, 1)[i], torch.stack(generate(model, row).logits, 1)[0], 1e-4)


def test_second_turn():
    model, cache, ids = tiny_model(), kv.KVCache(), prompt(1, 40)
    kv.prefill(model, ids, cache, chunk=16)
    first = generate(model, ids, cache, max_new_tokens=6).sequences
    more, seen = torch.cat([first, prompt(1, 30, seed=3)], 1), []
    kv.prefill(model, more, cache, chunk=16, advance=seen.append)
    assert sum(seen) == more.shape[1] - 1 - 45
    assert torch.equal(generate(model, more, cache).sequences, generate(model, more).sequences)


def test_a_failed_chunk_leaves_the_cache_usable():
    model, cache, ids = tiny_model(), kv.LocretCache(budget=256), prompt(1, 40)
    with pytest.raises(ValueError, match="carries no retaining heads"):
        kv.prefill(model, ids, cache)
    assert cache.prompt_incomplete is None


def test_prompt_that_is_in_the_cache_already():
    model, cache, ids = tiny_model(), kv.KVCache(), prompt(1, 40)
    kv.prefill(model, ids, cache)
    kv.prefill(model, ids, cache)
    assert cache.get_seq_length() == 39
    with pytest.raises(ValueError, match="holds 39 tokens already, the prompt has 20"):
        kv.prefill(model, ids[:, :20], cache)
    with pytest.raises(ValueError, match="chunk=0"):
        kv.prefill(model, ids, kv.KVCache(), chunk=0)


def test_query_first():
    ids, mask, rows = padded([9, 6])
    ids[0, 0] = ids[1, 3] = 1
    ours, real = kv.query_first(ids, 2, attention_mask=mask, bos_token_id=1)
    assert ours.shape == real.shape == (2, 11)
    assert ours[0].tolist() == [1, *ids[0, -2:].tolist(), *ids[0, 1:].tolist()]
    assert ours[1].tolist() == [0, 0, 0, 1, *ids[1, -2:].tolist(), *ids[1, 4:].tolist()]
    assert real[1].tolist() == [0] * 3 + [1] * 8
    plain, _ = kv.query_first(ids[:1], 3)
    assert plain[0].tolist() == [*ids[0, -3:].tolist(), *ids[0].tolist()]
    with pytest.raises(ValueError, match="n_query=7"):
        kv.query_first(ids, 7, attention_mask=mask)
