"""Configurations of caches as files."""

import json
import subprocess
import sys

import pytest
import torch
from cases import prompt, tiny_model

import hf_kvcache as kv
from hf_kvcache.cache_config import FILE, ConfigError, KVCacheConfig
from hf_kvcache.eval import asking
from hf_kvcache.eval.specs import SpecError, parse

TEXT = prompt(length=160)[0].tolist()
CACHES = {
    "dense": lambda: kv.KVCache(),
    "quant": lambda: kv.QuantCache(4, edge_layers=1, window=16),
    "sparse": lambda: kv.SparseCache("balanced", bits=8),
    "latents": lambda: kv.LowRankCache(0.5, bits=4),
    "adakv": lambda: kv.EvictionCache("adakv", ratio=0.5, scorer="keydiff", codec=kv.Quantize(8, axis="token")),
    "per layer": lambda: kv.KVCache(
        kv.SnapKV(ratio=0.5),
        kv.Quantize(4, axis="token"),
        window=16,
        per_layer={0: {"policy": None, "codec": kv.Quantize(8)}, 1: {"ratio": 0.25}},
    ),
}


def feed(model, cache, ids):
    return asking.feed(model, cache, torch.tensor([ids]))


def filled(cache):
    feed(tiny_model(), cache, TEXT)
    return cache


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_and_back(name, tmp_path):
    cache = CACHES[name]()
    config = KVCacheConfig.from_cache(cache, kl=0.5)
    path = config.save(tmp_path)
    assert path == tmp_path / FILE and KVCacheConfig.load(tmp_path) == KVCacheConfig.load(path) == config
    assert KVCacheConfig.from_json(config.to_json()) == config
    assert json.loads(path.read_text())["about"] == {"kl": 0.5}
    bytes_of = filled(cache).nbytes
    for given in (config, config.to_dict(), path, str(tmp_path)):
        assert filled(kv.KVCache.from_config(given, tiny_model().config)).nbytes == bytes_of


def test_only_what_is_not_the_default_is_written():
    assert KVCacheConfig.from_cache(kv.KVCache(window=7)).to_dict() == {"format_version": 1, "window": 7}


@pytest.mark.parametrize(
    "raw, words",
    [
        ({}, "format_version is missing"),
        ({"format_version": 99}, "format 99"),
        ({"format_version": 1, "widow": 7}, "widow"),
        ({"format_version": 1, "window": "7"}, "window"),
        ({"format_version": 1, "codec": [{"codec": "Quantize", "bits": 4}]}, "codec.*two"),
        ({"format_version": 1, "codec": [{"codec": "Quantize", "bit": 4}] * 2}, "codec.keys.bit"),
        ({"format_version": 1, "codec": [{"codec": "Quantize", "bits": 5}] * 2}, "codec.keys.*bits=5"),
        ({"format_version": 1, "policy": {"policy": "Keydif", "ratio": 0.5}}, "policy.*Keydif"),
        ({"format_version": 1, "per_layer": {"0": {"bits": 4}}}, "per_layer.0.bits"),
        ({"format_version": 1, "per_layer": {"00": {"window": 4}}}, "per_layer.00"),
        ({"format_version": 1, "per_layer": {"0": {"codec": [None, {"codec": "Quantize"}]}}}, "per_layer.0.codec"),
        ({"format_version": 1, "per_layer": {"0": {"ratio": 0.5}}}, "ratio.*policy"),
    ],
)
def test_what_a_file_cannot_say(raw, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        KVCacheConfig.from_dict(raw)
    (tmp_path / FILE).write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=rf"{FILE}: "):
        kv.KVCache.from_config(tmp_path)


def test_what_no_file_can_hold(tmp_path):
    with pytest.raises(ConfigError, match="chunk"):
        KVCacheConfig.from_cache(kv.LocretCache(budget=256))
    with pytest.raises(ConfigError, match=FILE):
        KVCacheConfig.load(tmp_path)


def test_as_a_specification(tmp_path):
    path = KVCacheConfig.from_cache(CACHES["per layer"]()).save(tmp_path / "a.json")
    spec = parse(f"config:{path}")
    assert spec == parse(f"config={path}") == parse(spec.text) and not spec.is_peer and not spec.is_learned
    assert filled(spec.build(tiny_model().config)).nbytes == filled(CACHES["per layer"]()).nbytes
    KVCacheConfig.from_cache(kv.QuantCache(4)).save(path)
    with pytest.raises(SpecError, match="has changed"):
        parse(spec.text)
    assert parse(f"config:{path}").text != spec.text
    with pytest.raises(SpecError, match="nothing.json"):
        parse("config:nothing.json")


def test_a_process_that_has_imported_nothing_else(tmp_path):
    path = KVCacheConfig.from_cache(CACHES["per layer"]()).save(tmp_path)
    code = f"import hf_kvcache as kv; print(type(kv.KVCache.from_config({str(path)!r}).policy).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "SnapKV\n"
