"""Questions that every policy is asked."""

import cases
import pytest
import torch
from toys import alone, feed, pairs

import hf_kvcache as kv
from hf_kvcache import registry
from hf_kvcache.policies.base import Policy, policy_from_spec
from hf_kvcache.policies.wrapper import Wrapper
from hf_kvcache.registry import METHODS

# settings that make a policy work hard on 50 tokens
OWN = {
    "chunkkv": dict(scorer="keydiff", chunk_size=5),
    "lagkv": dict(lag=6),
    "nacl": dict(n_queries=8),
    "pyramidkv": dict(n_queries=8),
    "snapkv": dict(n_queries=8),
}


def is_asked(name, kind):
    """Scorers of the registry, and wrappers that say above what they are around; Locret goes by heads of a model."""
    if not issubclass(kind, Policy) or kind.is_ragged or kind.is_trained or kind is kv.Locret:
        return False
    return name in OWN or not issubclass(kind, Wrapper)


KINDS = {m.name: registry.load(m.factory) for m in METHODS}
POLICIES = {name: (kind, OWN.get(name, {})) for name, kind in sorted(KINDS.items()) if is_asked(name, kind)}
# what these draw depends on the number of tokens seen, padding included
DETERMINISTIC = sorted(POLICIES.keys() - {"nacl", "random"})
# KeyDiff's mean key takes NaN from padding


def make(name, **knobs):
    kind, own = POLICIES[name]
    return kind(**cases.KNOBS | own | knobs)


@pytest.mark.parametrize(
    "name, fill", [(name, 2.0) for name in DETERMINISTIC] + [(name, float("nan")) for name in DETERMINISTIC], ids=str
)
@pytest.mark.parametrize("sizes", [[50], [10, 10, 29, 1]], ids=["one-shot", "chunked"])
def test_a_padded_row_is_the_row_alone(name, sizes, fill):
    toy = feed(make(name, budget=200), pads=(0, 13), sizes=sizes, fill=fill)
    padded = toy.policy.score(toy.view)
    policy = make(name, budget=24)
    kept = policy.select(padded, toy.view.positions, 50, 0)
    for b, n_pads in enumerate(toy.pads):
        single = alone(toy, b, make(name, budget=200))
        scores = single.policy.score(single.view)
        # a position is a score like another: only the order matters
        shift = n_pads if name == "streaming" else 0
        assert torch.allclose(scores[0] + shift, padded[b, :, n_pads:], atol=1e-5)
        chosen = policy.select(scores, single.view.positions, 50 - n_pads, 0)
        assert torch.equal(chosen[0] + n_pads, kept[b])


@pytest.mark.parametrize("name", POLICIES)
def test_protected_stay_and_padding_goes(name):
    toy = feed(make(name, budget=24), pads=(0, 13), sizes=[30, 20])
    positions = toy.layer.store.positions
    assert positions.shape[-1] == 24
    for b, h in pairs(toy):
        kept = positions[b, h].tolist()
        assert kept == sorted(set(kept)) and min(kept) >= 0
        first = toy.pads[b]
        assert {first, first + 1, *range(42, 50)} <= set(kept)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_packed_rows_are_scored_as_they_read(name):
    side = kv.Quantize(8, axis="token")
    toy = feed(make(name, budget=200), n=60, sizes=[40, 20], codec=side)
    dense = feed(make(name, budget=200), n=60, sizes=[40, 20])
    assert toy.layer.store.n_packed > 0
    packed, scores = toy.policy.score(toy.view), dense.policy.score(dense.view)
    if name == "lagkv":
        # ranks of nearly equal rows may change places
        assert ((packed - scores).abs() < 1e-3).float().mean() > 0.6
        return
    is_real = dense.view.positions >= 0
    assert ((packed - scores)[is_real].abs().max() / scores[is_real].abs().max()) < 0.05


@pytest.mark.parametrize("name", POLICIES)
def test_budget_above_length_is_dense(name):
    model, ids = cases.tiny_model(), cases.prompt(2, 60)
    ours = cases.generate(model, ids, kv.KVCache(policy=make(name, budget=80)))
    dense = cases.generate(model, ids)
    assert torch.equal(ours.sequences, dense.sequences)
    cases.assert_close("logits", torch.stack(ours.logits), torch.stack(dense.logits), 1e-4)


@pytest.mark.parametrize("size", [dict(budget=24), dict(ratio=0.4)], ids=["budget", "ratio"])
@pytest.mark.parametrize("name", POLICIES)
def test_generates_within_its_budget(name, size):
    model, (ids, mask, _) = cases.tiny_model(), cases.padded([60, 41])
    cache = kv.KVCache(policy=make(name, **size))
    out = cases.generate(model, ids, cache, attention_mask=mask, max_new_tokens=24)
    assert torch.stack(out.logits).isfinite().all()
    mean = sum(layer.store.n_kept for layer in cache.layers) / len(cache.layers)
    most = 24 if "budget" in size else int(0.4 * 83)
    assert most - 1 <= mean <= most + cases.KNOBS["interval"]
    assert cache.get_seq_length() == 83


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_padded_batch_generates_what_its_rows_do(name):
    model, (ids, mask, rows) = cases.tiny_model(), cases.padded([60, 41])
    # not by ratio: padding counts as seen
    out = cases.generate(model, ids, kv.KVCache(policy=make(name, budget=24)), attention_mask=mask)
    for b, row in enumerate(rows):
        single = cases.generate(model, row, kv.KVCache(policy=make(name, budget=24)))
        assert torch.equal(out.sequences[b, 60:], single.sequences[0, row.shape[1] :])


@pytest.mark.parametrize("name", POLICIES)
def test_chunked_prefill_over_packed_rows(name):
    model, (ids, mask, _) = cases.tiny_model(), cases.padded([80, 61])
    side = kv.Quantize(8, axis="token")
    cache = kv.KVCache(policy=make(name, budget=44), codec=(side, side), window=4)
    logits = cases.replay(model, cache, ids, [40, 20, 10, 1, 1, 1, 1, 1, 5], mask)
    assert logits[0].isfinite().all() and logits[1, 19:].isfinite().all()
    store = cache.layers[0].store
    assert store.n_packed and store.n_kept < 80
    again = kv.KVCache(policy=make(name, budget=44), codec=(side, side), window=4)
    cases.replay(model, again, ids, [40, 20, 10, 1, 1, 1, 1, 1, 5], mask)
    cases.assert_same_state(cache, again)


@pytest.mark.parametrize("name", POLICIES)
def test_beams_and_half_precision(name):
    model = cases.tiny_model(dtype=torch.bfloat16)
    cache = kv.KVCache(policy=make(name, budget=24))
    out = cases.generate(model, cases.prompt(2, 40), cache, num_beams=2)
    assert torch.stack(out.logits).isfinite().all() and cache.layers[0].store.n_kept <= 48


@pytest.mark.parametrize("name", POLICIES)
def test_spec_brings_it_back(name):
    policy = make(name, budget=100)
    assert policy_from_spec(policy.spec()) == policy
    assert kv.KVCache(policy=policy).policy is policy
