"""Retrofitted models through the features of `generate`; the model without a cache is the reference."""

import copy

import pytest
import torch
from cases import assert_same_state, generate, state
from tiny_retrofits import CACHES, batch, feed, lengths, llama, retrofitted, whole
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache

import hf_kvcache as kv
from hf_kvcache.compat import CACHE_NAME, cache_argument, sdpa_attention_forward, sdpa_mask
from hf_kvcache.dmc import retrofits

METHODS = ["dmc", "dms"]
KNOBS = {"dmc": dict(window=4), "dms": dict(window=6)}


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def model(method):
    """Never changed by a test."""
    return retrofitted(method, n_layers=2, bias=[0.3, 0.0], **KNOBS[method])


def new_cache(method, **options):
    return CACHES[method](**options)


def assert_as_without_a_cache(model, out, mask, n_prompt, rows=slice(None)):
    """Logits of generated tokens are those of the whole text at once."""
    sequences = out.sequences[:, :-1]
    n_new = sequences.shape[1] - n_prompt
    mask = torch.cat([mask[rows], mask.new_ones(len(sequences), n_new)], 1)
    with torch.no_grad():
        logits = whole(model, sequences, mask, (mask.cumsum(-1) - 1).clamp(min=0))[:, n_prompt - 1 :]
    worst = (torch.stack(out.logits, 1) - logits).abs().max()
    # `generate` keeps logits in float32
    assert worst <= 1e-7, f"off by {worst:.1e}"


# -- generate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(), dict(do_sample=True, temperature=3.0)], ids=["greedy", "sampling"])
def test_left_padded_batch(model, method, options):
    ids, mask, _ = batch([20, 9, 1])
    cache = new_cache(method)
    torch.manual_seed(0)
    out = generate(model, ids, cache, attention_mask=mask, **options)
    assert_as_without_a_cache(model, out, mask, 20)
    assert cache.get_seq_length() == 35
    # some row was merged or dropped, some were not
    assert (lengths(cache) < torch.tensor([35, 24, 16]).view(1, 3, 1)).any() and (lengths(cache) > 5).any()
    if options:
        return
    for b, n in enumerate((20, 9, 1)):
        alone = new_cache(method)
        row = generate(model, ids[b : b + 1, 20 - n :], alone)
        assert torch.equal(row.sequences[0, n:], out.sequences[b, 20:])
        assert torch.equal(lengths(alone)[:, 0], lengths(cache)[:, b])


def test_several_samples_of_a_prompt(model, method):
    ids, mask, _ = batch([20, 9])
    torch.manual_seed(0)
    options = dict(do_sample=True, temperature=3.0, num_return_sequences=3)
    out = generate(model, ids, new_cache(method), attention_mask=mask, **options)
    assert_as_without_a_cache(model, out, mask, 20, [0, 0, 0, 1, 1, 1])
    assert len(out.sequences.unique(dim=0)) == 6


def test_beam_search(model, method):
    ids, mask, _ = batch([20, 9])
    options = dict(attention_mask=mask, num_beams=3, num_return_sequences=2, max_new_tokens=10, output_scores=True)
    out = generate(model, ids, new_cache(method), **options)
    at_once = model.generate(ids, use_cache=False, do_sample=False, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, at_once.sequences)
    assert (out.sequences_scores - at_once.sequences_scores).abs().max() <= 1e-6
    # beams have changed places
    assert (out.beam_indices.diff(dim=1) != 0).any()


def test_prompt_in_chunks(model, method):
    ids, mask, _ = batch([20, 9])
    at_once, chunked = (
        generate(model, ids, new_cache(method), attention_mask=mask, **options)
        for options in ({}, dict(prefill_chunk_size=7))
    )
    assert torch.equal(at_once.sequences, chunked.sequences)
    cache = new_cache(method)
    kv.prefill(model, ids[:1], cache, chunk=6)
    assert cache.get_seq_length() == 19
    assert torch.equal(generate(model, ids[:1], cache).sequences[0], at_once.sequences[0])


def test_several_turns(model, method):
    ids, mask, _ = batch([20, 9])
    cache = new_cache(method)
    first = generate(model, ids, cache, attention_mask=mask).sequences
    ids = torch.cat([first, torch.full((2, 5), 9)], 1)
    mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - 20)], 1)
    out = generate(model, ids, cache, attention_mask=mask)
    assert_as_without_a_cache(model, out, mask, ids.shape[1])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_stock_implementations(model, method, implementation):
    ids, mask, positions = batch([20, 9])
    is_real = mask.bool()
    stock = copy.deepcopy(model)
    stock.set_attn_implementation(implementation)
    a, b = new_cache(method), new_cache(method)
    ours = generate(model, ids, a, attention_mask=mask)
    out = generate(stock, ids, b, attention_mask=mask)
    assert torch.equal(out.sequences, ours.sequences)
    assert (torch.stack(out.logits) - torch.stack(ours.logits)).abs().max() <= 1e-7
    assert torch.equal(lengths(a), lengths(b))
    with torch.no_grad():
        assert (whole(stock, ids, mask, positions) - whole(model, ids, mask, positions))[is_real].abs().max() <= 1e-10
        again = feed(stock, new_cache(method), ids, mask, positions, [5, 1, 14])
        assert (again - whole(model, ids, mask, positions))[is_real].abs().max() <= 1e-10
    # without padding, masks are left out
    plain = generate(stock, ids[:1], new_cache(method))
    assert torch.equal(plain.sequences[0], ours.sequences[0])


def test_offloading_does_nothing_on_a_cpu(model, method):
    ids, mask, _ = batch([20, 9])
    a, b = new_cache(method), new_cache(method, offloading=True)
    assert torch.equal(
        generate(model, ids, a, attention_mask=mask).sequences, generate(model, ids, b, attention_mask=mask).sequences
    )
    for i in range(2):
        b.offload(i, only_non_sliding=False)
        b.prefetch(i, only_non_sliding=False)
    assert_same_state(a, b)


# -- rows of a batch, copies, files --------------------------------------------------------------------------------


def go_on(model, cache, inputs, n):
    """Logits of the tokens after the first `n`."""
    with torch.no_grad():
        ids, mask, positions = inputs
        rest = [1, 3] + [1] * (ids.shape[1] - n - 4)
        logits, start = [], n
        for size in rest:
            piece = slice(start, start + size)
            start += size
            options = dict(attention_mask=mask[:, :start], position_ids=positions[:, piece], **cache_argument(cache))
            logits.append(model(ids[:, piece], **options).logits)
        return torch.cat(logits, 1)


def begun(model, method, inputs, n, **options):
    cache = new_cache(method, **options)
    with torch.no_grad():
        feed(model, cache, *(t[:, :n] for t in inputs), [n - 2, 1, 1])
    return cache


@pytest.mark.parametrize(
    "what, rows",
    [
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 0, 1])), [1, 0, 1]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ],
    ids=["repeat", "select", "reorder", "one"],
)
@pytest.mark.parametrize("n", [15, 33])
def test_rows_of_a_batch(model, method, what, rows, n):
    inputs = batch([n + 12, 19])
    cache = begun(model, method, inputs, n)
    what(cache)
    inputs = tuple(t[rows] for t in inputs)
    with torch.no_grad():
        wanted = whole(model, *inputs)[:, n:]
    assert (go_on(model, cache, inputs, n) - wanted)[inputs[1][:, n:].bool()].abs().max() <= 1e-10


def test_rows_that_are_padding_so_far(model, method):
    # the second row begins after the cache was taken apart
    inputs = batch([27, 3])
    cache = begun(model, method, inputs, 15)
    cache.batch_select_indices(torch.tensor([1, 0]))
    inputs = tuple(t[[1, 0]] for t in inputs)
    with torch.no_grad():
        wanted = whole(model, *inputs)[:, 15:]
    assert (go_on(model, cache, inputs, 15) - wanted)[inputs[1][:, 15:].bool()].abs().max() <= 1e-10


def test_reset(model, method):
    inputs = batch([27, 19])
    cache = begun(model, method, inputs, 15)
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    other = batch([20, 20, 4], seed=2)
    with torch.no_grad():
        logits = feed(model, cache, *other, [8, 1, 11])
        assert (logits - whole(model, *other))[other[1].bool()].abs().max() <= 1e-10


def test_a_prefix_is_used_twice(model, method):
    inputs = batch([27, 19])
    cache = begun(model, method, inputs, 15)
    for seed in (3, 4):
        ids = inputs[0].clone()
        ids[:, 15:] = batch([12, 12], seed=seed)[0]
        with torch.no_grad():
            wanted = whole(model, ids, *inputs[1:])[:, 15:]
        logits = go_on(model, copy.deepcopy(cache), (ids, *inputs[1:]), 15)
        assert (logits - wanted)[inputs[1][:, 15:].bool()].abs().max() <= 1e-10
    assert cache.get_seq_length() == 15


@pytest.mark.parametrize("codec", [None, kv.Quantize(8, axis="token")], ids=["dense", "quant8"])
def test_save_and_load(model, method, codec, tmp_path):
    inputs = batch([27, 3])
    cache = begun(model, method, inputs, 15, codec=codec)
    cache.save(tmp_path)
    loaded = kv.KVCache.load(tmp_path, model)
    assert_same_state(loaded, cache)
    # a file holds no spare pages
    assert loaded.nbytes <= cache.nbytes
    assert torch.equal(go_on(model, loaded, inputs, 15), go_on(model, cache, inputs, 15))
    assert_same_state(loaded, cache)
    with pytest.raises(kv.CacheFileError, match="another model"):
        kv.KVCache.load(tmp_path, retrofitted(method, n_layers=2, seed=5))


# -- what is refused -----------------------------------------------------------------------------------------------


def test_tokens_cannot_be_taken_back(model, method):
    cache = begun(model, method, batch([27]), 15)
    name = method.upper()
    with pytest.raises(ValueError, match=f"{name} has merged or overwritten"):
        cache.crop(-10)
    fresh = new_cache(method)
    for options in (dict(prompt_lookup_num_tokens=3), dict(assistant_model=llama(dtype=torch.float64))):
        with pytest.raises(ValueError, match=f"{name}.*without an assistant"):
            generate(model, batch([12])[0], fresh, **options)
        assert fresh.get_seq_length() == 0


@pytest.mark.parametrize(
    "make",
    [DynamicCache, lambda: kv.QuantCache(4), kv.KVCache, lambda: kv.EvictionCache("adakv", budget=80)],
    ids=["dynamic", "quant", "dense", "adakv"],
)
def test_other_caches(model, method, make):
    with pytest.raises(ValueError, match=f"{method.upper()}, .*use {CACHE_NAME}={method.upper()}Cache"):
        generate(model, batch([12])[0], make())


def test_generation_without_our_cache_says_which(model, method):
    with pytest.raises(ValueError, match=f"use {CACHE_NAME}={method.upper()}Cache"):
        generate(model, batch([12])[0])


def test_a_static_cache(model):
    with pytest.raises(ValueError, match="DMCCache|DMSCache"), torch.no_grad():
        model(batch([12])[0], **cache_argument(StaticCache(config=model.config, max_cache_len=64)))


def test_a_model_without_decisions(method):
    with pytest.raises(ValueError, match=f"{method.upper()} goes by the decisions of a retrofitted model"):
        generate(llama(2), batch([12])[0], new_cache(method))


def test_the_cache_of_the_other_method(model, method):
    other = "dms" if method == "dmc" else "dmc"
    with pytest.raises(ValueError, match=f"retrofitted for {method.upper()}, the cache is for {other.upper()}"):
        generate(model, batch([12])[0], new_cache(other))


@pytest.mark.parametrize("implementation", ["hf_kvcache", "sdpa", "eager"])
@pytest.mark.parametrize(
    "sizes, at",
    [([8, 4], 9), ([8] + [1] * 4, 9), ([12], 9), ([12], 11), ([8, 4], 11)],
    ids=["chunk", "token", "prompt", "right", "right-chunk"],
)
def test_padding_between_tokens(model, method, sizes, at, implementation):
    ids, mask, positions = batch([12, 7])
    mask[0, at] = 0
    stock = copy.deepcopy(model)
    stock.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match="pad on the left"), torch.no_grad():
        feed(stock, new_cache(method), ids, mask, positions, sizes)


def test_right_padding_without_a_cache(model):
    # a batch of training texts
    ids, mask, positions = batch([12, 12])
    mask[1, 7:] = 0
    with torch.no_grad():
        logits = whole(model, ids, mask, positions)
        assert (logits[0] - whole(model, ids[:1], mask[:1], positions[:1])[0]).abs().max() <= 1e-10
        alone = whole(model, ids[1:, :7], mask[1:, :7], positions[1:, :7])
        assert (logits[1, :7] - alone[0]).abs().max() <= 1e-10


def test_attention_that_cannot_know_the_decisions(model, method):
    AttentionInterface.register("opaque", lambda module, q, *args, **kwargs: (q.transpose(1, 2).contiguous(), None))
    other = copy.deepcopy(model)
    other.set_attn_implementation("opaque")
    for options in (dict(use_cache=False), cache_argument(new_cache(method))):
        with pytest.raises(ValueError, match='attn_implementation="hf_kvcache"'), torch.no_grad():
            other(batch([12])[0], **options)


def test_attention_weights_are_not_there(model, method):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="output_attentions"), torch.no_grad():
        eager(batch([12])[0], output_attentions=True, **cache_argument(new_cache(method)))


def test_another_batch_size(model, method):
    cache = begun(model, method, batch([27, 27]), 15)
    with pytest.raises(ValueError, match="batch size|batch"), torch.no_grad():
        model(batch([1, 1, 1])[0], **cache_argument(cache))


def test_a_disabled_retrofit_is_the_model(model, method, monkeypatch):
    inputs = batch([12])
    own = copy.deepcopy(model)
    for child in retrofits(own).values():
        child.is_active = False
    with torch.no_grad():
        plain = llama(2)
        with torch.no_grad():
            # `bias` has changed weights
            state = {name: t for name, t in own.state_dict().items() if "kv_dmc" not in name}
            plain.load_state_dict(state)
        assert torch.equal(whole(own, *inputs), whole(plain, *inputs))
    with pytest.raises(ValueError, match="goes by the decisions"), torch.no_grad():
        own(inputs[0], **cache_argument(new_cache(method)))


def test_what_is_said_of_a_cache(model, method):
    cache = begun(model, method, batch([27]), 15)
    rows = cache.report()
    assert [row["tokens_seen"] for row in rows] == [15, 15]
    assert [row["n_kept"] for row in rows] == lengths(cache).amax((1, 2)).tolist()
    assert method.upper() in repr(cache)


def test_an_attention_function_that_comes_later_cannot_ignore_decisions():
    model = retrofitted("dmc", window=0)
    AttentionInterface.register("late", sdpa_attention_forward)
    AttentionMaskInterface.register("late", sdpa_mask)
    model.set_attn_implementation("late")
    with torch.no_grad(), pytest.raises(ValueError, match="decides what attention sees"):
        model(torch.arange(6)[None], use_cache=False)


@pytest.mark.parametrize("is_trained", [False, True])
def test_several_texts_in_one_row_are_refused(is_trained):
    model = retrofitted("dmc", window=0).train(is_trained)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with torch.no_grad(), pytest.raises(ValueError, match="one text per row"):
        model(torch.arange(6)[None], position_ids=positions, use_cache=False)


@pytest.mark.parametrize("window", [0, 4])
def test_gradients_flow_within_a_call_and_end_at_what_is_cached(method, window):
    knobs = dict(window=window) if method == "dmc" else KNOBS[method]
    model = retrofitted(method, n_layers=2, bias=[0.3, 0.0], **knobs).requires_grad_(True)
    ids, _, _ = batch([20])

    def gradients(new, **kwargs):
        model.zero_grad()
        model(new, **kwargs).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    cache = new_cache(method)
    for start, n in ((0, 12), (12, 1), (13, 1), (14, 4)):
        new = ids[:, start : start + n]
        found = gradients(new, **cache_argument(cache))
        if not start:
            expected = gradients(new, use_cache=False)
            # rows of linear decisions are reached by relaxed ones alone
            assert found.keys() == expected.keys()
            for name in found:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-10)
        assert all(found[f"model.layers.0.self_attn.{name}_proj.weight"].any() for name in "qkvo")
        assert not any(t.requires_grad for t in state(cache).values())


def test_an_empty_cache_of_another_kind_is_refused_at_once(model, method):
    with torch.no_grad(), pytest.raises(ValueError, match="cannot go on in a KVCache"):
        model(batch([5])[0], **cache_argument(kv.KVCache()))


def test_training_does_without_a_cache(model, method):
    training = copy.deepcopy(model).train()
    with pytest.raises(RuntimeError, match=r"call model.eval\(\) to generate"):
        training(batch([5])[0], **cache_argument(new_cache(method)))
