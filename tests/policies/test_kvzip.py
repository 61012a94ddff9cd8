"""KVzip: scores of the second pass, what it leaves in the cache, and what goes on from there."""

import copy

import pytest
import torch
from cases import assert_close, assert_same_state, generate, padded, prompt, tiny_model

import hf_kvcache as kv
from hf_kvcache.cache_config import KVCacheConfig
from hf_kvcache.compat import cache_argument
from hf_kvcache.hub.export import export

LEVELS = ["model", "layer", "head"]
KNOBS = dict(n_sink=2, window=4)


def prefilled(model, ids, cache=None, mask=None, **options):
    cache = kv.EvictionCache("kvzip", ratio=1.0, **KNOBS) if cache is None else cache
    kv.prefill(model, ids, cache, attention_mask=mask, **options)
    return cache


def scores(cache):
    """Of every layer in the order of the text, `[L, B, Hkv, T]`; nothing has gone."""
    return torch.stack([layer.store.state("score") for layer in cache.layers])


def largest(ids, n_seen, chunks, lead=0, request=None, model=None):
    """Largest weight of a dense model's own attention, pair by pair: `[L, B, Hkv, n_seen]`.

    Weights are shared out among a chunk and all that is fed to repeat it.
    """
    model = model or tiny_model(implementation="eager")
    n_heads = model.config.num_key_value_heads
    best = torch.zeros(model.config.num_hidden_layers, len(ids), n_heads, n_seen)
    asked = ids[:, :0] if request is None else request.expand(len(ids), -1)
    for start, stop in chunks:
        text = torch.cat([ids[:, :n_seen], asked, ids[:, max(start - lead, 0) : stop]], 1)
        attentions = model(text, output_attentions=True, use_cache=False).attentions
        for layer, weights in enumerate(attentions):
            n_group = weights.shape[1] // n_heads
            for head in range(weights.shape[1]):
                for query in range(n_seen + asked.shape[1], text.shape[1]):
                    row = weights[:, head, query]
                    own = row[:, start:stop] / (row[:, start:stop].sum(-1) + row[:, n_seen:].sum(-1)).unsqueeze(-1)
                    held = best[layer, :, head // n_group, start:stop]
                    held.copy_(torch.maximum(held, own))
    return best


@pytest.mark.parametrize("implementation", ["hf_kvcache", "sdpa", "eager"])
def test_scores_are_the_formula(implementation):
    model, ids = tiny_model(implementation=implementation), prompt(2, 50)
    cache = prefilled(model, ids)
    assert_close("scores", scores(cache), largest(ids, 49, [(0, 49)]), 1e-5)


def test_chunks_are_led_in_and_a_request_has_no_say():
    model, ids, request = tiny_model(), prompt(2, 50), prompt(1, 5, seed=3)[0]
    cache = prefilled(model, ids, kv.EvictionCache("kvzip", ratio=1.0, chunk=20, **KNOBS), request=request)
    expected = largest(ids, 49, [(0, 20), (20, 40), (40, 49)], 8, request)
    assert_close("scores", scores(cache), expected, 1e-5)


def test_a_softcap_counts():
    ids = prompt(2, 50)
    cache = prefilled(tiny_model("gemma2"), ids)
    expected = largest(ids, 49, [(0, 49)], model=tiny_model("gemma2", "eager"))
    full = [layer for layer in cache.layers if isinstance(layer, kv.KVLayer)]
    assert [layer.layer_idx for layer in full] == [1, 3]
    assert_close("scores", torch.stack([layer.store.state("score") for layer in full]), expected[1::2], 1e-5)


def test_many_rows_and_queries_are_read_in_blocks(monkeypatch):
    model, ids = tiny_model(), prompt(2, 70)
    whole = scores(prefilled(model, ids, chunk=9))
    # whatever is longer than the prompt is one chunk
    wide = prefilled(model, ids, kv.EvictionCache("kvzip", ratio=1.0, chunk=69, **KNOBS))
    assert_close("scores", scores(wide), whole, 1e-5)
    monkeypatch.setattr("hf_kvcache.second_pass.BLOCK", 16)
    monkeypatch.setattr("hf_kvcache.policies.kvzip.KEYS", 16)
    # 8 queries at a time, the least
    monkeypatch.setattr("hf_kvcache.policies.weights.IN_CACHE", 1)
    assert_close("scores", scores(prefilled(model, ids)), whole, 1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [dict(budget=40), dict(ratio=0.4)], ids=["budget", "ratio"])
def test_the_best_rows_stay_and_the_repetition_goes(level, size):
    model, ids = tiny_model(), prompt(2, 101)
    held = scores(prefilled(model, ids))
    cache = prefilled(model, ids, kv.EvictionCache("kvzip", level=level, **size, **KNOBS))
    assert cache.get_seq_length() == 100 and cache.layers[1].evicted_at == 100
    kept = torch.zeros(2, 2, 2, 100, dtype=torch.bool)  # [L, B, Hkv, T]
    for i, layer in enumerate(cache.layers):
        positions = layer.store.positions
        assert positions.max() == 99 and layer.store.dense.n_tokens == 4
        for b, h in ((b, h) for b in range(2) for h in range(2)):
            kept[i, b, h, positions[b, h][positions[b, h] >= 0].long()] = True
    assert kept[..., :2].all() and kept[..., -4:].all()
    dims = {"model": (0, 2, 3), "layer": (2, 3), "head": (3,)}[level]
    n_heads = {"model": 4, "layer": 2, "head": 1}[level]
    assert (kept.sum(dims) == 40 * n_heads).all()
    free = held.clone()
    free[..., :2] = free[..., -4:] = torch.nan
    least = torch.where(kept, free, torch.inf).nan_to_num(torch.inf).amin(dims)
    most = torch.where(kept, -torch.inf, free).nan_to_num(-torch.inf).amax(dims)
    assert (least >= most).all() and cache.nbytes < cache.nbytes_dense


@pytest.mark.parametrize("level", LEVELS)
def test_a_padded_row_is_the_row_alone(level):
    model, (ids, mask, rows) = tiny_model(), padded([70, 51])

    def make():
        return kv.EvictionCache("kvzip", budget=40, level=level, **KNOBS)

    cache = prefilled(model, ids, make(), mask)
    out = generate(model, ids, cache, attention_mask=mask)
    for b, row in enumerate(rows):
        single = prefilled(model, row, make())
        alone = generate(model, row, single)
        assert_close("logits", torch.stack(out.logits, 1)[b], torch.stack(alone.logits, 1)[0], 1e-4)
        for layer, own in zip(cache.layers, single.layers):
            for h in range(2):
                held = layer.store.positions[b, h]
                expected = own.store.positions[0, h]
                assert (held[held >= 0] - (70 - row.shape[1])).tolist() == expected[expected >= 0].tolist()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "mistral-window8", "gemma2", "gemma3"])
def test_a_ratio_of_one_changes_nothing(arch):
    model, ids = tiny_model(arch), prompt(2, 60)
    cache = prefilled(model, ids, kv.EvictionCache("kvzip", ratio=1.0), chunk=17)
    assert_close(
        "logits",
        torch.stack(generate(model, ids, cache).logits),
        torch.stack(generate(model, ids).logits),
        1e-4,
    )


def test_layers_of_transformers_forget_the_repetition():
    model, ids = tiny_model("gemma3"), prompt(2, 60)
    cache, plain = prefilled(model, ids), kv.KVCache()
    kv.prefill(model, ids, plain)
    for i in (0, 2):
        assert torch.equal(cache.layers[i].keys, plain.layers[i].keys)
        assert cache.layers[i].get_seq_length() == plain.layers[i].get_seq_length() == 59


def test_rows_are_scored_before_they_are_encoded():
    model, ids = tiny_model(), prompt(2, 80)
    cache = prefilled(model, ids, kv.QuantCache(8, policy=kv.KVzip(ratio=1.0, n_sink=2), window=4))
    assert cache.layers[0].store.n_packed and torch.equal(scores(cache), scores(prefilled(model, ids)))
    cache = prefilled(model, ids, kv.QuantCache(8, policy=kv.KVzip(budget=50, n_sink=2), window=4))
    assert torch.stack(generate(model, ids, cache).logits).isfinite().all()


def test_save_load_and_beams(tmp_path):
    model, ids = tiny_model(), prompt(2, 60)
    cache = prefilled(model, ids, kv.EvictionCache("kvzip", ratio=0.4, **KNOBS))
    cache.save(tmp_path)
    again = kv.KVCache.load(tmp_path, model=model)
    assert_same_state(cache, again)
    cache.batch_repeat_interleave(2)
    beams = generate(model, ids, cache, num_beams=2)
    assert torch.stack(beams.logits).isfinite().all() and cache.get_seq_length() == 75
    # what has been read twice is not read again
    kv.prefill(model, ids, again)
    assert torch.equal(
        generate(model, ids, again).sequences,
        generate(model, ids, prefilled(model, ids, kv.EvictionCache("kvzip", ratio=0.4, **KNOBS))).sequences,
    )


@pytest.mark.parametrize("codec", [None, kv.Quantize(8, axis="token")], ids=["dense", "quant8"])
def test_what_has_come_since_is_repeated(codec, monkeypatch):
    monkeypatch.setattr("hf_kvcache.second_pass.BLOCK", 16)
    model, ids = tiny_model(), prompt(2, 121)
    cache = prefilled(model, ids[:, :60], kv.KVCache(kv.KVzip(ratio=1.0, n_sink=2), codec, window=4))
    for token in ids[:, 59:99].split(1, 1):
        model(token, **cache_argument(cache), use_cache=True)
    assert cache.layers[0].store.n_packed > 59
    kv.prefill(model, ids, cache)
    first = torch.nn.functional.pad(largest(ids, 59, [(0, 59)]), (0, 61))
    expected = torch.maximum(first, largest(ids, 120, [(59, 120)], 8))
    assert_close("scores", scores(cache), expected, 1e-5 if codec is None else 0.1)


def test_a_second_turn_is_scored_and_evicted_from():
    model, ids = tiny_model(), prompt(1, 60)
    cache = prefilled(model, ids, kv.EvictionCache("kvzip", ratio=0.5, **KNOBS))
    first = generate(model, ids, cache, max_new_tokens=20).sequences
    assert cache.layers[0].evicted_at == 59 and cache.get_seq_length() == 79
    n_before = sum(int((layer.store.positions >= 0).sum()) for layer in cache.layers)
    assert n_before == 4 * (29 + 20)
    more = torch.cat([first, prompt(1, 41, seed=5)], 1)
    twin = copy.deepcopy(cache)
    kv.prefill(model, more, cache)
    assert cache.get_seq_length() == 120 and cache.layers[0].evicted_at == 120
    assert sum(int((layer.store.positions >= 0).sum()) for layer in cache.layers) == 4 * 60
    assert torch.stack(generate(model, more, cache).logits).isfinite().all()
    # a question that comes by `generate` stays whole
    generate(model, more, twin, max_new_tokens=1)
    assert twin.layers[0].evicted_at == 59
    assert sum(int((layer.store.positions >= 0).sum()) for layer in twin.layers) == n_before + 4 * 42


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rerotated_keys_close_up(dtype):
    model, ids = tiny_model(dtype=dtype), prompt(2, 60)
    cache = prefilled(model, ids, kv.EvictionCache("kvzip", ratio=0.4, rerotate_keys=True, **KNOBS))
    assert torch.stack(generate(model, ids, cache).logits).isfinite().all()
    for layer in cache.layers:
        angle, positions = layer.store.state("angle"), layer.store.positions
        for own, held in zip(angle.flatten(0, 1), positions.flatten(0, 1)):
            n = int((held >= 0).sum())
            assert own[held >= 0].tolist() == list(range(75 - n, 75))


def test_a_failed_pass_leaves_a_cache_that_goes_on(monkeypatch):
    model, ids = tiny_model(), prompt(2, 60)
    cache = kv.EvictionCache("kvzip", ratio=0.4, **KNOBS)

    def fail(self, q, k, n_rows, view, is_real=None):
        if view.layer.layer_idx:
            raise RuntimeError("out of memory")
        return k.new_zeros(*k.shape[:2], n_rows)

    with monkeypatch.context() as patch:
        patch.setattr(kv.KVzip, "largest_weights", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            kv.prefill(model, ids, cache)
    assert [layer.tokens_seen for layer in cache.layers] == [59, 59]
    twin = copy.deepcopy(cache)
    assert torch.equal(generate(model, ids, twin).sequences, generate(model, ids).sequences)
    kv.prefill(model, ids, cache)
    assert_same_state(cache, prefilled(model, ids, kv.EvictionCache("kvzip", ratio=0.4, **KNOBS)))


def test_what_cannot_work_is_said(tmp_path):
    model, ids = tiny_model(), prompt(2, 60)
    cache = kv.EvictionCache("kvzip", ratio=0.4, **KNOBS)
    with pytest.raises(ValueError, match=r"KVzip reads a prompt twice.*hf_kvcache.prefill"):
        generate(model, ids, cache)
    # nothing of what was refused is there
    assert cache.get_seq_length() == 0
    kv.prefill(model, ids, cache)
    assert_same_state(cache, prefilled(model, ids, kv.EvictionCache("kvzip", ratio=0.4, **KNOBS)))
    with pytest.raises(ValueError, match="request= asks for the repetition"):
        kv.prefill(model, ids, kv.KVCache(), request=ids[0, :3])
    # a text that comes token by token is never evicted from
    cache = kv.EvictionCache("kvzip", ratio=0.4)
    for token in ids.split(1, 1):
        model(token, **cache_argument(cache), use_cache=True)
    assert cache.layers[0].store.n_kept == 60
    for knobs in (dict(decode=True), dict(level="heads"), dict(chunk=0)):
        with pytest.raises(ValueError, match=f"KVzip: {next(iter(knobs))}="):
            kv.KVzip(ratio=0.4, **knobs)
    for scorer in ("kvzip", kv.KVzip(ratio=0.4)):
        with pytest.raises(ValueError, match="KVzip chooses by itself"):
            kv.AdaKV(ratio=0.4, scorer=scorer)
    with pytest.raises(ValueError, match="KVzip reads a prompt twice.*exported"):
        export(model, kv.EvictionCache("kvzip", ratio=0.4), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_configuration_holds_it():
    cache = kv.KVCache(kv.KVzip(ratio=0.4), kv.Quantize(4, axis="token"))
    again = KVCacheConfig.from_cache(cache).build()
    assert again.policy == cache.policy and again.codec == cache.codec
