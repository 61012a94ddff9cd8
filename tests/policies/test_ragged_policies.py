"""Policies that let heads keep different numbers of rows, against plain loops over heads."""

import pytest
import torch
from cases import generate, prompt, tiny_model
from toys import HEADS, feed, pairs

import hf_kvcache as kv
from hf_kvcache.shards import WHOLE

KNOBS = dict(n_sink=2, n_recent=4)


def kept(toy, b, h):
    """Positions that one head of one row has kept, counted from its first real token."""
    positions = toy.layer.store.positions[b, h]
    return (positions[positions >= 0] - toy.pads[b]).tolist()


def protected(n):
    return {0, 1, *range(n - 4, n)}


def norms(toy, b, h):
    return -toy.k[b, h, toy.pads[b] :].norm(dim=-1)


@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
def test_adakv_shares_the_budget_of_a_layer(floor):
    policy = kv.AdaKV(budget=44, scorer="l2norm", floor=floor, **KNOBS)
    toy = feed(policy, n=100, pads=(0, 13))
    for b in range(2):
        n = 100 - toy.pads[b]
        worth = {}
        for h in range(HEADS):
            own = norms(toy, b, h)
            own[sorted(protected(n))] = float("inf")
            safe = own.topk(min(round(floor * 44), 44)).indices
            own[safe] = float("inf")
            worth |= {(h, i): own[i].item() for i in range(n)}
        best = sorted(worth, key=worth.__getitem__, reverse=True)[: HEADS * 44]
        for h in range(HEADS):
            assert kept(toy, b, h) == sorted(i for head, i in best if head == h)
    sizes = [len(kept(toy, 0, h)) for h in range(HEADS)]
    assert sum(sizes) == HEADS * 44
    assert (len(set(sizes)) == 1) == (floor == 1.0)


def test_adakv_follows_the_budgets_of_its_scorer():
    scorer = kv.PyramidKV(budget=44, n_queries=4, **KNOBS)
    policy = kv.AdaKV(budget=44, scorer=scorer, **KNOBS)
    context = type("LayerContext", (), {"depth": (0, 4), "shard": WHOLE})()
    assert policy.for_model(context).tokens_to_keep(1000) == scorer.for_model(context).tokens_to_keep(1000) > 44


@pytest.mark.parametrize("knobs", [dict(threshold=-2.6), dict(threshold=-2.6, budget=50)], ids=["open", "at most 50"])
def test_threshold_keeps_what_is_above(knobs):
    toy = feed(kv.Threshold(scorer="l2norm", **knobs, **KNOBS), n=100)
    for b, h in pairs(toy):
        own = norms(toy, b, h)
        own[sorted(protected(len(own)))] = float("inf")
        wanted = {i for i in own.sort(descending=True).indices[: knobs.get("budget", 100)].tolist() if own[i] >= -2.6}
        # the dense window has not been chosen from
        assert kept(toy, b, h) == sorted(wanted | protected(len(own)))
    assert len({len(kept(toy, b, h)) for b, h in pairs(toy)}) > 1


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_a_share_is_the_fewest_rows_that_hold_it(share):
    toy = feed(kv.Threshold(scorer=kv.TOVA(ratio=1.0), share=share, **KNOBS), n=100, pads=(0, 13))
    for b, h in pairs(toy):
        mass = sum(toy.weights(b, head)[:, -1].mean(0) for head in range(HEADS)) / HEADS
        ranked = mass.clone()
        ranked[sorted(protected(len(mass)))] = float("inf")
        order, held, total, wanted = ranked.sort(descending=True).indices.tolist(), 0.0, mass.sum().item(), []
        for i in order:
            if held >= share * total - 1e-6 and share < 1:
                break
            wanted.append(i)
            held += mass[i].item()
        assert kept(toy, b, h) == sorted(set(wanted) | protected(len(mass)))


def test_a_share_of_negative_scores_is_refused():
    with pytest.raises(ValueError, match="scores of L2Norm are negative"):
        feed(kv.Threshold(scorer="l2norm", share=0.5, **KNOBS))


def test_head_split_keeps_all_or_the_ends():
    toy = feed(kv.Duo(gates=torch.tensor([[0.2, 0.9]]), n_sink=2, n_recent=6), n=60)
    for b in range(2):
        n = 60 - toy.pads[b]
        assert kept(toy, b, 0) == [0, 1, *range(n - 6, n)]
        assert kept(toy, b, 1) == list(range(n))


def test_head_split_needs_gates_of_the_model():
    with pytest.raises(ValueError, match=r"gates must be \[2, 2\]"):
        generate(tiny_model(), prompt(1, 20), kv.EvictionCache("duo", gates=[[1, 0]]))


@pytest.mark.parametrize("recovery", [0.3, 0.6, 0.8, 0.999])
def test_fastgen_takes_the_cheapest_set_that_recovers(recovery):
    policy = kv.FastGen(recovery=recovery, local=0.2, heavy=0.2, n_queries=8, **KNOBS)
    toy = feed(policy, n=100, pads=(0, 13), scaling=1.5)
    for b, h in pairs(toy):
        mass = toy.weights(b, h)[:, -8:].sum(1).mean(0)
        n = len(mass)
        ends = protected(n)
        local = ends | set(range(n - 20, n))
        heavy = local | set(mass.topk(20).indices.tolist())
        sets = [ends, local, heavy, set(range(n))]
        chosen = next(i for i, s in enumerate(sets) if sum(mass[j] for j in s) >= recovery * mass.sum())
        assert kept(toy, b, h) == sorted(sets[chosen])
        assert toy.layer.store.layer_state["profile"][b, h, 0] == chosen


def test_the_profile_stays_what_the_prompt_made_it():
    cache = kv.KVCache(kv.FastGen(recovery=0.5, n_queries=8, interval=4, **KNOBS), window=4)
    generate(tiny_model(), prompt(2, 60), cache, max_new_tokens=1)
    before = [layer.store.layer_state["profile"].clone() for layer in cache.layers]
    more = torch.cat([prompt(2, 60), prompt(2, 30, seed=8)], 1)
    generate(tiny_model(), more, cache, max_new_tokens=20)
    assert all(torch.equal(a, layer.store.layer_state["profile"]) for a, layer in zip(before, cache.layers))


def test_heads_are_looked_at_once_in_an_interval():
    seen = []

    class Listens(kv.L2Norm):
        def score(self, view):
            seen.append(view.tokens_seen)
            return super().score(view)

    policy = kv.AdaKV(budget=256, scorer=Listens(budget=256, **KNOBS), interval=10, **KNOBS)
    # nothing goes, which must not make it look again at every step
    generate(tiny_model(), prompt(1, 60), kv.KVCache(policy, window=4), max_new_tokens=26)
    assert seen[::2] == [60, 70, 80] and seen[1::2] == [60, 70, 80]


def test_wrappers_refuse_what_has_no_scores():
    with pytest.raises(ValueError, match="Duo chooses by itself"):
        kv.AdaKV(budget=64, scorer=kv.Duo(gates=[[1]]))
    with pytest.raises(ValueError, match="'quant' is not an eviction method"):
        kv.AdaKV(budget=64, scorer="quant")
    with pytest.raises(TypeError, match="scorer must be a Policy"):
        kv.AdaKV(budget=64, scorer=3)


MISTAKES = {
    "either threshold= ": lambda: kv.Threshold(),
    r"share=2 is not in \(0, 1\]": lambda: kv.Threshold(share=2),
    r"floor=2 is not in \[0, 1\]": lambda: kv.AdaKV(budget=64, floor=2),
    "takes neither budget= nor ratio=": lambda: kv.FastGen(budget=64),
    "gates= says which heads": lambda: kv.Duo(),
    "recovery=0 is not": lambda: kv.FastGen(recovery=0),
    "pages that serve any head": lambda: kv.LowRankCache(0.5, n_sink=0, policy=kv.AdaKV(budget=256)),
    "packs 32 tokens": lambda: kv.QuantCache(4, key_axis="channel", policy=kv.AdaKV(budget=256)),
    "n_sink=4 of the cache does not go with pages": lambda: kv.KVCache(kv.AdaKV(budget=256), kv.Sparse(0.5), n_sink=4),
    "leaves nothing to choose beside up to 96 dense rows": lambda: kv.KVCache(kv.AdaKV(budget=64)),
    "rerotate_keys=True closes the gaps": lambda: kv.KVCache(rerotate_keys=True),
    "rerotate_keys=True rotates keys again": lambda: kv.EvictionCache(
        "snapkv", budget=256, rerotate_keys=True, codec=kv.Quantize(8, axis="token")
    ),
    "Merge changes rows that stay": lambda: kv.EvictionCache(
        "snapkv", budget=256, merge=True, codec=kv.Quantize(8, axis="token")
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_what_cannot_work_is_refused(message):
    with pytest.raises(ValueError, match=message):
        MISTAKES[message]()
