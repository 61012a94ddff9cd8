"""Every method through the features of `generate`."""

import copy

import pytest
import torch
from cases import (
    ARCHITECTURES,
    BY_ID,
    CASES,
    EVICTING,
    LOSSLESS,
    LOSSY,
    NAMED,
    VOCAB,
    assert_close,
    assert_same_state,
    generate,
    padded,
    prompt,
    replay,
    splits,
    state,
    stock_implementation,
    tiny_model,
)
from rooms import telling
from transformers import AttentionInterface, DynamicCache, TextStreamer

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument

LENGTH, NEW = 60, 16


def replayed(model, case, sequences, n_prompt=LENGTH):
    """Logits of the generated tokens from a fresh cache: the prompt, then one token at a time `[B, new, V]`."""
    n_new = sequences.shape[1] - n_prompt
    return replay(model, case.make(), sequences[:, :-1], [n_prompt] + [1] * (n_new - 1))[:, n_prompt - 1 :]


# -- every row runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [NAMED, "sdpa", "eager"])
@pytest.mark.parametrize("case", LOSSY, ids=str)
def test_greedy(case, implementation):
    model = tiny_model("llama", implementation)
    cache = case.make()
    out = generate(model, prompt(2), cache)
    assert out.sequences.shape == (2, LENGTH + NEW)
    assert cache.get_seq_length() == LENGTH + NEW - 1
    logits = torch.stack(out.logits, 1)
    assert_close("logits", logits, replayed(tiny_model("llama"), case, out.sequences), 1e-4)
    # the row compresses: otherwise it tests nothing
    dense = generate(model, prompt(2), DynamicCache()).logits
    assert (logits - torch.stack(dense, 1)).abs().max() > 1e-4
    for layer in cache.layers:
        assert layer.store.n_packed or layer.store.n_kept < layer.tokens_seen


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", ["quant4-window8", "keydiff-budget24"])
def test_every_architecture(case, arch):
    # named and stock implementations hold the same bytes and give the same logits, left padding included
    ids, mask, _ = padded([60, 40])
    stock, named = BY_ID[case].make(), BY_ID[case].make()
    a = generate(tiny_model(arch, stock_implementation(arch)), ids, stock, attention_mask=mask)
    b = generate(tiny_model(arch), ids, named, attention_mask=mask)
    assert torch.equal(a.sequences, b.sequences)
    # rows that differ by a rounding error may differ by a code
    assert_close("logits", torch.stack(a.logits), torch.stack(b.logits), 5e-4)


# -- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [NAMED, "sdpa"])
@pytest.mark.parametrize("case", LOSSLESS, ids=str)
def test_left_padded_batch_equals_its_rows(case, implementation):
    ids, mask, rows = padded([60, 9])
    model = tiny_model("llama", implementation)
    together = generate(model, ids, case.make(), attention_mask=mask)
    for row, alone in enumerate(rows):
        out = generate(model, alone, case.make())
        assert torch.equal(out.sequences[0, -NEW:], together.sequences[row, -NEW:])
        assert_close("logits", torch.stack(together.logits)[:, row], torch.stack(out.logits)[:, 0], 1e-5)


@pytest.mark.parametrize("implementation", [NAMED, "sdpa"])
@pytest.mark.parametrize("interval, lengths", [(1, [60, 30, 9]), (4, [60, 30, 25])], ids=["interval1", "interval4"])
@pytest.mark.parametrize("policy", ["streaming", "keydiff"])
def test_evicting_left_padded_batch_equals_its_rows(policy, interval, lengths, implementation):
    # 9 is shorter than the budget: that row keeps pads until it has enough tokens of its own. A longer interval
    # lets a row overshoot the budget, and a short row alone begins to do so at another step than in a batch
    ids, mask, rows = padded(lengths)
    model, knobs = tiny_model("llama", implementation), dict(budget=24, n_sink=2, n_recent=8, interval=interval)
    cache = kv.EvictionCache(policy, **knobs)
    together = generate(model, ids, cache, attention_mask=mask)
    for row, alone in enumerate(rows):
        cache_alone = kv.EvictionCache(policy, **knobs)
        out = generate(model, alone, cache_alone)
        assert torch.equal(out.sequences[0, -NEW:], together.sequences[row, -NEW:])
        assert_close("logits", torch.stack(together.logits)[:, row], torch.stack(out.logits)[:, 0], 1e-5)
        for ours, its in zip(cache.layers, cache_alone.layers):
            assert kept(ours, row, ids.shape[1] - alone.shape[1]) == kept(its, 0, 0)


def kept(layer, row, n_pads):
    """Kept tokens of every head of a row, counted from its first real one."""
    return [[p - n_pads for p in head.tolist() if p >= 0] for head in layer.store.positions[row]]


@pytest.mark.parametrize("policy", ["streaming", "keydiff"])
def test_evicting_padded_batch_token_by_token(policy):
    # pads that arrive one at a time are pads too
    ids, mask, rows = padded([40, 33])
    model, make = tiny_model(), lambda: kv.EvictionCache(policy, budget=24, n_sink=2, n_recent=8, interval=1)
    logits = replay(model, make(), ids, [1] * 40, mask)
    for row, alone in enumerate(rows):
        n = alone.shape[1]
        assert_close("logits", logits[row, -n:], replay(model, make(), alone, [1] * n)[0], 1e-5)


@pytest.mark.parametrize("bits, tolerance", [(8, 0.05), (4, 1.0)])
def test_left_padded_batch_is_close_to_its_rows_when_quantised(bits, tolerance):
    # blocks of 32 tokens begin at other tokens in a padded row, so scales differ, and pads share the first block
    ids, mask, rows = padded([90, 70])
    model = tiny_model()
    together = replay(model, kv.QuantCache(bits, window=8), ids, [60] + [1] * 30, mask)
    for row, alone in enumerate(rows):
        n = alone.shape[1]
        out = replay(model, kv.QuantCache(bits, window=8), alone, [n - 30] + [1] * 30)
        assert_close("logits", together[row, -30:], out[0, -30:], tolerance)


# -- chunked prefill, several turns, prefixes ----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill_in_chunks(case):
    model, cache = tiny_model(), case.make()
    out = generate(model, prompt(2), cache, prefill_chunk_size=16)
    assert cache.get_seq_length() == LENGTH + NEW - 1
    if case.lossless:
        assert torch.equal(out.sequences, generate(model, prompt(2), DynamicCache()).sequences)
    else:
        sizes = splits(LENGTH, 16) + [1] * (NEW - 1)
        logits = replay(model, case.make(), out.sequences[:, :-1], sizes)[:, LENGTH - 1 :]
        assert_close("logits", torch.stack(out.logits, 1), logits, 1e-4)


@pytest.mark.parametrize("implementation", telling([NAMED, "sdpa"], NAMED))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_several_turns(case, implementation):
    model, cache = tiny_model("llama", implementation), case.make()
    ids, sizes = prompt(1, 30, seed=3), []
    for turn in range(3):
        n_fed = ids.shape[1] - sum(sizes)
        out = generate(model, ids, cache, max_new_tokens=8)
        sizes += [n_fed] + [1] * 7
        ids = torch.cat([out.sequences, prompt(1, 11, seed=turn)], 1)
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    logits = replay(tiny_model(), DynamicCache() if case.lossless else case.make(), out.sequences[:, :-1], sizes)
    assert_close("logits", torch.stack(out.logits, 1), logits[:, -8:], 1e-5 if case.lossless else 1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_deepcopy_reuses_a_prefix(case):
    model, prefix = tiny_model(), case.make()
    model(prompt(1, LENGTH), **cache_argument(prefix))
    n_bytes, before = prefix.nbytes, {where: t.clone() for where, t in state(prefix).items()}
    for seed in (5, 6):
        ids = torch.cat([prompt(1, LENGTH), prompt(1, 5, seed)], 1)
        out = generate(model, ids, copy.deepcopy(prefix), max_new_tokens=8)
        logits = replay(model, case.make(), out.sequences[:, :-1], [LENGTH, 5] + [1] * 7)
        assert_close("logits", torch.stack(out.logits, 1), logits[:, -8:], 1e-4)
    assert prefix.nbytes == n_bytes
    assert all(torch.equal(t, before[where]) for where, t in state(prefix).items())


def test_deepcopy_does_not_copy_weights():
    model, cache = tiny_model(), kv.EvictionCache("keydiff", budget=48)
    model(prompt(), **cache_argument(cache))
    memo = {}
    copy.deepcopy(cache, memo)
    kinds = (torch.nn.Module, torch.nn.Parameter)
    assert not [x for x in memo.get(id(memo), []) if isinstance(x, kinds)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batch_repeat_interleave_shares_a_prefix(case):
    model, cache = tiny_model(), case.make()
    model(prompt(1, LENGTH), **cache_argument(cache))
    cache.batch_repeat_interleave(3)
    rebuilt = case.make()
    model(prompt(1, LENGTH).repeat(3, 1), **cache_argument(rebuilt))
    tails = torch.cat([prompt(1, 6, seed) for seed in (7, 8, 9)])
    ours, theirs = (replay(model, c, tails, [3, 1, 1, 1]) for c in (cache, rebuilt))
    assert_close("logits", ours, theirs, 1e-5)


# -- beams and sampling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_beams(case):
    model, cache = tiny_model(), case.make()
    out = generate(model, prompt(2), cache, num_beams=3, num_return_sequences=3, output_scores=True, length_penalty=0.0)
    if case.lossless:
        dense = generate(model, prompt(2), DynamicCache(), num_beams=3, num_return_sequences=3)
        assert torch.equal(out.sequences, dense.sequences)
    # each beam carried its own rows: its score is that of the same tokens through a cache of its own
    new = out.sequences[:, LENGTH:]
    scores = replayed(model, case, out.sequences).log_softmax(-1).gather(-1, new[..., None]).sum((1, 2))
    assert_close("beam scores", out.sequences_scores, scores, 2e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sampling_several_sequences(case):
    model = tiny_model()
    options = dict(do_sample=True, num_return_sequences=3, top_k=0, temperature=1.0)
    torch.manual_seed(0)
    out = generate(model, prompt(), case.make(), **options)
    assert len({tuple(row.tolist()) for row in out.sequences}) == 3
    assert_close("logits", torch.stack(out.logits, 1), replayed(model, case, out.sequences), 1e-4)
    if case.lossless:
        torch.manual_seed(0)
        assert torch.equal(out.sequences, generate(model, prompt(), DynamicCache(), **options).sequences)


# -- speculation ---------------------------------------------------------------------------------------------------


def speculation(kind):
    """Arguments of `generate` for the ways to draft tokens: a bad drafter, a perfect one, the prompt itself."""
    if kind == "prompt-lookup":
        return dict(prompt_lookup_num_tokens=4)
    return dict(assistant_model=tiny_model(seed=1 if kind == "bad-assistant" else 0))


def wrong_assistant():
    """An assistant that never guesses right: it drafts the token that the model likes least."""
    model = copy.deepcopy(tiny_model())
    model.lm_head.weight.neg_()
    return model


REPETITIVE = torch.cat([prompt(1, 15, seed=2)] * 4, 1)  # so that prompt lookup finds drafts


@pytest.mark.parametrize(
    "kind", telling(["bad-assistant", "perfect-assistant", "prompt-lookup"], "bad-assistant", "prompt-lookup")
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_speculation(case, kind):
    model, cache = tiny_model(), case.make()
    out = generate(model, REPETITIVE, cache, **speculation(kind))
    assert out.sequences.shape == (1, LENGTH + NEW)
    # the last tokens may have been accepted in one step, without being fed
    assert LENGTH + NEW - 8 <= cache.get_seq_length() < LENGTH + NEW
    if case.lossless:
        assert torch.equal(out.sequences, generate(model, REPETITIVE, DynamicCache()).sequences)
    for layer in cache.layers:
        store = layer.store
        assert not layer._is_unsettled
        if case.evicts and "prompt-only" not in case.id:
            # at most: the budget, the interval, and what one step of drafted tokens adds
            assert store.n_kept <= layer.policy.tokens_to_keep(layer.tokens_seen) + layer.policy.interval + 24
        if store.keys is not None and store.n_kept >= store.min_length:
            assert store.dense.n_tokens < store.window + store.n_sink + store.step + 24
    # the cache goes on in an ordinary generate()
    ids = torch.cat([out.sequences, prompt(1, 4)], 1)
    n_fed = ids.shape[1] - cache.get_seq_length()
    assert generate(model, ids, cache, max_new_tokens=8).sequences.shape[1] == ids.shape[1] + 8
    assert n_fed >= 4


@pytest.mark.parametrize("case", [case for case in EVICTING if "quant" not in case.id], ids=str)
def test_rejected_drafts_leave_no_trace(case):
    # with one draft per step, always rejected, evicting and verifying is greedy decoding in the same steps
    model = tiny_model()
    reference = generate(model, REPETITIVE, case.make())
    out = generate(model, REPETITIVE, case.make(), assistant_model=wrong_assistant(), num_assistant_tokens=1)
    assert torch.equal(out.sequences, reference.sequences)


@pytest.mark.parametrize("arch", ["mistral-window8", "gemma2", "gemma3"])
def test_speculation_on_hybrids(arch):
    model = tiny_model(arch)
    reference = generate(model, REPETITIVE, DynamicCache(config=model.config))
    for kind in ("prompt-lookup", "bad-assistant"):
        out = generate(model, REPETITIVE, kv.KVCache(), **speculation(kind))
        assert torch.equal(out.sequences, reference.sequences), kind


# -- other ways to run a model -------------------------------------------------------------------------------------


class Words:
    """Just enough of a tokenizer for a streamer."""

    def decode(self, ids, **kwargs):
        return "".join(f"<{int(i)}>" for i in ids)


def test_streaming_output(capsys):
    model, cache = tiny_model(), kv.QuantCache(4, window=8)
    sequences = model.generate(
        prompt(), **cache_argument(cache), streamer=TextStreamer(Words()), max_new_tokens=10, do_sample=False
    )
    printed = capsys.readouterr().out.strip()
    assert printed == Words().decode(sequences[0])


@pytest.mark.parametrize("implementation", telling([NAMED, "sdpa"], "sdpa"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reset_and_use_again(case, implementation):
    model, cache = tiny_model("llama", implementation), case.make()
    generate(model, prompt(1, 70, seed=4), cache, max_new_tokens=8)
    assert cache.nbytes > 0
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0 and cache.compression_ratio == 1.0
    fresh = case.make()
    # another batch size is fine once the cache is empty
    again, once = (generate(model, prompt(2), c, max_new_tokens=8) for c in (cache, fresh))
    assert torch.equal(torch.stack(again.logits), torch.stack(once.logits))
    assert_same_state(cache, fresh)


def test_static_cache_and_no_cache_under_our_name():
    # without a KVCache the named implementation is sdpa
    model, stock = tiny_model(), tiny_model("llama", "sdpa")
    ids, mask, _ = padded([40, 20])
    for options in (dict(cache_implementation="static"), dict(use_cache=False), {}):
        a, b = (generate(m, ids, None, attention_mask=mask, **options) for m in (model, stock))
        assert torch.equal(a.sequences, b.sequences)


def test_reference_attention_is_not_ours():
    assert AttentionInterface()[NAMED].__module__.startswith("hf_kvcache")
    assert max(ids.max() for ids in (prompt(), REPETITIVE)) < VOCAB
