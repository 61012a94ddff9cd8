"""What single layers lose, and bytes shared out among them."""

import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

import hf_kvcache as kv
from hf_kvcache.cache_config import KVCacheConfig
from hf_kvcache.cli import main
from hf_kvcache.codecs import Dense
from hf_kvcache.models import embedded_model
from hf_kvcache.tuning.allocate import Offer, allocate, hull, uniform
from hf_kvcache.tuning.culprits import NobodyToBlame, culprits
from hf_kvcache.tuning.follow import Followed, divergence
from hf_kvcache.tuning.menu import RATIOS, Choice, Menu, menus_of
from hf_kvcache.tuning.probes import Probe, Score, Text
from hf_kvcache.tuning.rates import STEPS, WARM_UP, decode_rate
from hf_kvcache.tuning.sensitivity import LayerTable, add_codecs, add_ratios, blame
from hf_kvcache.tuning.tuner import Goal, Trial, Tuned, Tuner

A, B, C = (Choice(1.0, name, name) for name in "248")


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        embedded_model(), dtype=torch.float32, attn_implementation="hf_kvcache"
    ).eval()


@pytest.fixture(scope="module")
def probe(model):
    ids = torch.randint(5, 1000, (220,), generator=torch.Generator().manual_seed(0)).tolist()
    return Probe(model, Text("text", ids[:200], ids[200:], list(range(19))))


def test_the_hull_leaves_out_what_is_never_best():
    offers = [Offer(1, 10, A), Offer(2, 9.5, B), Offer(3, 2, C), Offer(4, 3, A), Offer(5, 1, B)]
    assert [offer.nbytes for offer in hull(offers)] == [1, 3, 5]


def test_bytes_go_where_they_save_most():
    flat = [Offer(1, 1.0, A), Offer(2, 0.9, B)]
    steep = [Offer(1, 9.0, A), Offer(2, 1.0, B), Offer(3, 0.0, C)]
    assert allocate([flat, steep], 2) == [A, A]
    assert allocate([flat, steep], 3) == [A, B]
    assert allocate([flat, steep], 4.5) == [A, C]
    assert allocate([flat, steep], 99) == [B, C]
    with pytest.raises(ValueError, match="smallest"):
        allocate([flat, steep], 1.5)
    assert uniform([flat, steep], 4, 1) == [B] and uniform([flat, steep], 3, 2) == [A]
    # what one layer alone has is no choice of all
    assert uniform([flat, steep], 99, 3) == [B, A]


def test_what_follows_is_read_as_by_the_model(model, probe):
    text = probe.text
    followed = Followed(model, probe.rows, len(text.context), text.follow, text.scored)
    torch.testing.assert_close(followed.logp.detach(), probe.expected, rtol=1e-3, atol=1e-3)
    assert all(p.requires_grad for p in model.parameters())


def test_fewer_bits_lose_more_in_every_layer(model, probe):
    text, menu = probe.text, Menu(None, 16, ("8", "4", "2"))
    followed = Followed(model, probe.rows, len(text.context), text.follow, text.scored)
    grads, tables = followed.samples(4), [LayerTable() for _ in probe.rows]
    add_codecs(tables, menu, probe, followed.let_go(), grads, 1.0)
    for i, table in enumerate(tables):
        for losses in (table.keys, table.values):
            assert 0 < losses["8"] < losses["4"] < losses["2"]
        # bytes that were foreseen are those of a layer that exists
        layer = probe.filled_layer(menu.one_layer(i, B, model.config), i)
        assert table.nbytes(B) == pytest.approx(layer.nbytes)


def test_layers_share_the_blame(model, probe):
    cache = probe.filled(kv.QuantCache(3, window=16, config=model.config))
    found = blame(probe, cache)
    real = probe.score(probe.filled(kv.QuantCache(3, window=16, config=model.config)))
    assert found.kl == pytest.approx(real.kl, rel=0.05, abs=1e-5)
    assert sum(found.shares) == pytest.approx(found.kl, rel=0.4)
    assert divergence(probe.expected, probe.expected).item() == 0


def test_what_a_dense_side_would_save_is_what_it_saves(model, probe):
    """Foreseen from rows, KL and bytes are those of a cache in which that side stays dense."""

    def make(**options):
        return kv.KVCache(codec=kv.Quantize(2), window=16, config=model.config, **options)

    found = culprits(model, [probe.text], make)
    assert [one.kl_without for one in found] == sorted(one.kl_without for one in found)
    assert {one.side for one in found} == {"keys", "values"} and found[0].kl_without < found[0].kl
    before = probe.filled(make()).nbytes
    for one in found[:2]:
        pair = (Dense(), kv.Quantize(2)) if one.side == "keys" else (kv.Quantize(2), Dense())
        better = probe.filled(make(per_layer={one.layer: {"codec": pair}}))
        assert (better.nbytes - before) / probe.nbytes == pytest.approx(one.bytes_ratio, rel=0.1)
        assert probe.score(better).kl == pytest.approx(one.kl_without, rel=0.1)


@pytest.mark.parametrize("policy", [kv.AdaKV, kv.KVzip])
def test_heads_of_different_lengths_are_read_as_the_cache_reads_them(model, probe, policy):
    cache = probe.filled(kv.KVCache(policy(ratio=0.4), kv.Quantize(4, axis="token"), window=16, config=model.config))
    found = blame(probe, cache)
    counts = torch.cat([layer.store.packed.counts.flatten() for layer in cache.layers])
    assert len(counts.unique()) > 1
    assert found.kl == pytest.approx(probe.score(cache).kl, rel=0.02)


def test_heads_of_different_lengths_are_blamed(model, probe):
    found = culprits(model, [probe.text], lambda: kv.KVCache(kv.AdaKV(ratio=0.5), window=16, config=model.config))
    assert {one.side for one in found} == {"tokens"} and found[0].kl_without < found[0].kl


def test_nobody_is_blamed_where_rows_are_not_shown(model, probe):
    with pytest.raises(NobodyToBlame, match="DynamicCache"):
        culprits(model, [probe.text], DynamicCache)


def test_tokens_that_a_policy_shares_out_itself(model, probe):
    """Layers then choose codecs alone, one menu for each ratio of all; bytes that are foreseen are real."""
    menus = menus_of(kv.KVzip(ratio=1.0), 16, ("8", "2", "rank0.5:4"))
    assert [menu.ratios for menu in menus] == [(ratio,) for ratio in RATIOS]
    with pytest.raises(ValueError):
        # a codec that there is not is not one that the policy cannot have
        menus_of(kv.KVzip(ratio=1.0), 16, ("8", "nine"))
    # latents of all heads are not rows of one
    menu = next(menu for menu in menus if menu.ratios == (0.35,))
    assert menu.names == ("8", "2") and len(menu.choices()) == 4
    text = probe.text
    followed = Followed(model, probe.rows, len(text.context), text.follow, text.scored)
    grads, tables = followed.samples(4), [LayerTable() for _ in probe.rows]
    add_codecs(tables, replace(menu, policy=None), probe, followed, grads, 1.0)
    add_ratios(tables, menu, probe, followed.let_go(), grads, 1.0)
    choices = [Choice(0.35, "8", "2"), *[Choice(0.35, "2", "2")] * (len(tables) - 1)]
    cache = menu.cache(choices, range(len(tables)), model.config)
    assert cache.policy == kv.KVzip(ratio=0.35) and sorted(cache.per_layer) == [0]
    probe.filled(cache)
    for table, choice, layer in zip(tables, choices, cache.layers, strict=True):
        assert table.loss(choice) > table.keys["2"] or choice.keys != "2"
        # the last token is fed after the second pass
        assert table.nbytes(choice) == pytest.approx(layer.nbytes, rel=0.02)


def test_a_cache_of_choices(model, probe):
    choices = [Choice(0.5, "8", "4"), Choice(1.0, "4c", "2"), Choice(0.5, "8", "4"), Choice(0.25, "8", "4")]
    cache = Menu(kv.KeyDiff(ratio=1.0), 16).cache(choices, range(4), model.config)
    assert sorted(cache.per_layer) == [1, 3] and cache.per_layer[3] == {"ratio": 0.25}
    probe.filled(cache)
    assert [layer.store.n_kept for layer in cache.layers] == [100, 200, 100, 50]
    assert cache.layers[1].store.keys.axis == "channel"


def test_the_command(tmp_path, capsys):
    options = ["--context", "256", "--pieces", "1", "--needles", "0", "--rounds", "2", "--policies", "keydiff"]
    assert main(["tune", "--bytes", "0.3", "--out", str(tmp_path), *options]) == 0
    said = json.loads(capsys.readouterr().out)
    config = KVCacheConfig.load(tmp_path)
    assert said["bytes_ratio"] == config.about["bytes_ratio"] <= 0.3 * 1.002
    assert config.about["goal"]["bytes"] == 0.3 and config.about["trials"]
    assert main(["tune", "--bytes", "0.001", "--out", str(tmp_path), *options]) == 2
    assert "smallest" in capsys.readouterr().err
    assert main(["tune", "--bytes", "0.3", "--out", str(tmp_path), *options[:-1], "kvzip"]) == 0
    err = capsys.readouterr().err
    assert "fill this cache by hf_kvcache.prefill; it cannot be exported" in err
    assert isinstance(kv.KVCache.from_config(tmp_path).policy, kv.KVzip)
    # what lies between the ratios of the menu is looked at, too
    assert {float(ratio) for ratio in re.findall(r"KVzip ([\d.]+), cache 1", err)} - set(RATIOS)
    assert main(["tune", "--bytes", "0.3", "--out", str(tmp_path), *options[:-1], "duo"]) == 2
    assert "duo" in capsys.readouterr().err


def test_a_model_with_bases_is_offered_ranks(tmp_path, capsys):
    bases = tmp_path / "bases"
    made = ["--rank", "0.5", "--samples", "4", "--length", "256", "--allocator", "uniform", "--out", str(bases)]
    assert main(["calibrate", "lowrank", *made]) == 0
    options = ["--context", "256", "--pieces", "1", "--needles", "0", "--rounds", "2", "--policies"]
    assert main(["tune", "--adapter", str(bases), "--bytes", "0.4", "--out", str(tmp_path), *options]) == 0
    capsys.readouterr()
    # some bases have fewer directions than half of them: so much is not offered
    assert any("LowRank" in repr(codec) for codec in kv.KVCache.from_config(tmp_path).all_codecs)


def test_the_most_kl_is_a_goal_too(tmp_path, capsys):
    options = ["--context", "256", "--pieces", "1", "--needles", "0", "--rounds", "2", "--policies", "keydiff"]
    assert main(["tune", "--max-kl", "0.02", "--out", str(tmp_path), *options]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["goal"]["max_kl"] == 0.02 and said["text"]["kl"] <= 0.02 and said["bytes_ratio"] < 0.5
    assert main(["tune", "--max-kl", "0", "--out", str(tmp_path / "no"), *options]) == 2
    assert "no cache on offer comes below a KL of 0" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_speed_is_a_goal_too(tmp_path, capsys, monkeypatch):
    """A clock of bytes: the cache with the least loss of those that are fast enough, not the fastest one."""
    rates = []

    def rate(probe, cache):
        rates.append(1e6 / probe.filled(cache).nbytes)
        return rates[-1]

    monkeypatch.setattr("hf_kvcache.tuning.tuner.decode_rate", rate)
    options = ["--context", "256", "--pieces", "1", "--needles", "0", "--rounds", "2", "--policies", "keydiff"]
    assert main(["tune", "--tokens-per-second", "7", "--out", str(tmp_path), *options]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["goal"]["tokens_per_second"] == 7
    assert said["tokens_per_second"] == pytest.approx(min(r for r in rates if r >= 7), abs=0.01)
    assert min(rates) < 7 < max(rates)
    assert main(["tune", "--tokens-per-second", "1e9", "--out", str(tmp_path / "no"), *options]) == 2
    said = capsys.readouterr().err
    assert f"the fastest has {max(rates):.1f}" in said and not (tmp_path / "no").exists()


def test_decoding_is_timed_behind_the_real_cache(model, probe):
    cache = kv.QuantCache(4, window=16, config=model.config)
    assert decode_rate(probe, cache) > 0
    assert cache.get_seq_length() == len(probe.text.context) + WARM_UP + STEPS


def test_a_goal_that_was_missed_is_no_result(model, monkeypatch):
    """What does not fit is refused, not written with the bytes that it has."""
    tuner = Tuner.__new__(Tuner)
    menu = Menu(None, 16)
    trials = [Trial(menu, [], {"text": 0.1}, [], 0.31), Trial(menu, [], {"text": 0.01}, [], 0.4)]
    monkeypatch.setattr(tuner, "_within", lambda *args: trials)
    with pytest.raises(ValueError, match="the smallest cache that was measured has 0.3100 of the bytes, not 0.3"):
        tuner.tune(Goal(bytes_ratio=0.3))
    monkeypatch.setattr(tuner, "_verified", lambda trial, found: Tuned(trial, None, {"text": Score(0.02, 0, 0)}, {}))
    with pytest.raises(ValueError, match="the nearest has 0.0200"):
        tuner.tune(Goal(max_kl=0.015))
    assert tuner.tune(Goal(max_kl=0.05)).trial is trials[1]
