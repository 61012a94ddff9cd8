"""However a manifest is damaged, it is refused by one error that names the field, in bounded memory and time."""

import json
import random
import resource

import pytest
import torch
from cases import prompt, tiny_model
from test_persist import fill

import hf_kvcache as kv
from hf_kvcache import persist
from hf_kvcache.manifest import read_manifest
from hf_kvcache.typed import Misfit

N = 110
KINDS = {
    "dense": ("llama", lambda: kv.KVCache()),
    "quant4-edge": ("llama", lambda: kv.QuantCache(4, window=16, edge_layers=1)),
    "sparse-quant4": ("llama", lambda: kv.SparseCache(0.5, bits=4, layout="index", window=16)),
    "lowrank": ("llama", lambda: kv.LowRankCache(0.5, window=16)),
    "lowrank-shared": ("llama", lambda: kv.LowRankCache(0.25, bits=4, share_layers=2, window=8)),
    "keydiff-rerotated": ("llama", lambda: kv.EvictionCache("keydiff", budget=40, n_recent=8, rerotate_keys=True)),
    "h2o": ("llama", lambda: kv.EvictionCache("h2o", budget=40, n_recent=8, interval=4)),
    "expected": ("llama", lambda: kv.EvictionCache("expected_attention", budget=40, n_recent=8)),
    "adakv": ("llama", lambda: kv.EvictionCache("adakv", budget=44, scorer="h2o", n_recent=8, window=4)),
    "adakv-quant8": ("llama", lambda: kv.QuantCache(8, window=8, policy=kv.AdaKV(budget=48, scorer="keydiff"))),
    "locret": ("llama", lambda: kv.LocretCache(budget=200, local=8, chunk=16)),
    "hybrid": ("gemma2", lambda: kv.QuantCache(4, window=8)),
    "sliding": ("mistral-window8", lambda: kv.KVCache()),
}
ODD = [
    None, True, False, 0, 1, -1, 2, 7, 33, 10**6, 2**31, 10**12, 2**63, 10**40, 0.5, 1.0, -0.5, 1e308, float("nan"),
    float("inf"), "", "x", "KVLayer", "float16", "float64", "int8", "Chain", "Quantize", "LowRank", "Policy", "KeyDiff",
    "keys", "../up", "0", "\ud800", "a" * 3000, [], [None], [0], [1, 0], [[0, 1]], [[[]]], {}, {"x": 1},
    {"class": "KVLayer"}, {"policy": "KeyDiff", "budget": 64}, {"policy": "AdaKV"}, {"codec": "Dense"},
    {"codec": "Quantize", "bits": 4}, {"codec": "Chain", "first": {"codec": "Dense"}, "second": {"codec": "Dense"}},
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every kind of cache: its folder, its manifest as text, its tensors and the config of its model."""
    found = {}
    for name, (arch, make) in KINDS.items():
        folder, model = tmp_path_factory.mktemp(name), tiny_model(arch)
        if name == "locret":
            # without its heads, but with what its class has beside a policy
            cache = make()
        else:
            cache = fill(model, make(), prompt(2, N))
        cache.save(folder)
        text = (folder / "manifest.json").read_text()
        found[name] = folder, text, persist._read_tensors(folder, read_manifest(json.loads(text))), model
    return found


def places(node, path=()):
    """Every place in nested lists and objects."""
    yield path
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(value, (*path, key))


def nested(depth, draw):
    value = 1
    for _ in range(depth):
        value = draw.choice([lambda v: [v], lambda v: {"first": v, "codec": "Chain"}, lambda v: {"policy": v}])(value)
    return value


def mutated(manifest, draw):
    """One to three changes somewhere: another value, nothing, something more, the value of another place."""
    every = list(places(manifest))[1:]
    # shapes are many, and all are compared in the same way
    every = [path for path in every if path[0] != "shapes" or draw.random() < 0.05]
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        *above, last = draw.choice(every)
        node = manifest
        try:
            for key in above:
                node = node[key]
            old = node[last]
        except (KeyError, IndexError, TypeError):
            continue
        how = draw.randrange(8)
        if how == 0:
            del node[last]
        elif how == 1 and isinstance(node, dict):
            node[draw.choice(["x", "keys", "update", "budget", "n_sink", "class", "__class__", ""])] = draw.choice(ODD)
        elif how == 2 and isinstance(old, list):
            node[last] = draw.choice([old * 2, old[1:], old[::-1], old * 300])
        elif how == 3:
            node[last] = nested(draw.choice([3, 30, 400]), draw)
        elif how == 4 and isinstance(old, (int, float)) and not isinstance(old, bool):
            node[last] = draw.choice([old + 1, old - 1, -old, old * 10**9, float(old), str(old), [old]])
        else:
            node[last] = draw.choice(ODD)
    return manifest


def assembled(raw, tensors, config):
    manifest = read_manifest(raw)
    persist.check_shapes(manifest, tensors, "file")
    return persist.assemble(kv.KVCache, manifest, tensors, config)


@pytest.mark.parametrize("name", KINDS)
def test_mutated_manifests(saved, name):
    _, text, tensors, model = saved[name]
    draw, n_valid, n_refused = random.Random(f"seed of {name}"), 0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10_000 // len(KINDS) + 1):
        raw = mutated(json.loads(text), draw)
        try:
            cache = assembled(raw, tensors, model.config)
            assert isinstance(cache, kv.KVCache) and cache.nbytes < 2**22
            n_valid += 1
        except (Misfit, kv.CacheFileError) as error:
            assert 3 < len(str(error)) < 2000
            n_refused += 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
    # a test that refuses everything, or nothing, would say nothing
    assert n_refused > 400 and n_valid > 2


@pytest.mark.parametrize("name", KINDS)
def test_mutated_manifests_in_files(saved, name):
    folder, text, _, model = saved[name]
    draw, path = random.Random(f"files of {name}"), folder / "manifest.json"
    n_refused = 0
    try:
        for _ in range(30):
            path.write_text(json.dumps(mutated(json.loads(text), draw)), errors="surrogatepass")
            try:
                kv.KVCache.load(folder, model=model)
            except kv.CacheFileError as error:
                assert str(folder) in str(error)
                n_refused += 1
    finally:
        path.write_text(text)
    assert n_refused > 10
    assert kv.KVCache.load(folder, model=model).get_seq_length() == (0 if name == "locret" else N)


@pytest.mark.parametrize("name", KINDS)
def test_cut_and_flipped_manifests(saved, name):
    folder, text, _, model = saved[name]
    draw, path, data = random.Random(f"bytes of {name}"), folder / "manifest.json", text.encode()
    try:
        for _ in range(30):
            broken = bytearray(data[: draw.randrange(len(data))] if draw.random() < 0.3 else data)
            for _ in range(draw.randrange(1, 4)):
                if broken:
                    broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
            path.write_bytes(broken)
            try:
                kv.KVCache.load(folder, model=model)
            except kv.CacheFileError as error:
                assert str(folder) in str(error)
    finally:
        path.write_text(text)


@pytest.mark.parametrize("name", KINDS)
def test_flipped_tensors_under_a_right_checksum(saved, name, tmp_path):
    _, text, _, model = saved[name]
    folder, draw = saved[name][0], random.Random(f"tensors of {name}")
    data = next(folder.glob("*.safetensors")).read_bytes()
    # the header is what can be wrong; rows are any numbers
    n_header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(20):
        broken = bytearray(data)
        broken[draw.randrange(n_header)] ^= 1 << draw.randrange(8)
        where = tmp_path / "broken.safetensors"
        where.write_bytes(broken[: len(broken) - draw.choice([0, 0, 5])])
        checksum = persist._checksum(where)
        where = where.rename(tmp_path / f"cache-{checksum[:16]}.safetensors")
        manifest = json.loads(text) | {"tensors": where.name, "sha256": checksum}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(kv.CacheFileError, match="safetensors"):
            kv.KVCache.load(tmp_path, model=model)


# -- the field that is wrong is named ---------------------------------------------------------------------------------


def test_wrong_types_name_their_field(saved):
    _, text, tensors, model = saved["quant4-edge"]
    names = json.loads(text).keys() - {"max_length", "format_version", "edge_codec", "codec", "model", "policy"}
    for name in names:
        for value in (None, "x", -1, 10**12, float("nan"), [None], {"x": []}, nested(400, random.Random(0))):
            raw = json.loads(text) | {name: value}
            with pytest.raises((Misfit, kv.CacheFileError), match=name):
                assembled(raw, tensors, model.config)
    for name in names - {
        "groups", "min_length", "exact_prefill", "rerotate_keys", "edge_layers", "offloading", "records_past",
        "attributes",
    }:  # fmt: skip
        raw = json.loads(text)
        del raw[name]
        with pytest.raises((Misfit, kv.CacheFileError), match=f"{name} is missing"):
            assembled(raw, tensors, model.config)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    {
        "10**12 tokens": ("dense", ("layers", 1, "tokens_seen", 10**12), r"layers\[1\].tokens_seen"),
        "a token too many": ("dense", ("layers", 1, "tokens_seen", N + 1), "nbytes_dense"),
        "10**9 tokens of an evicting cache": ("h2o", ("layers", 1, "tokens_seen", 10**9), "nbytes_dense"),
        "rows that are not there": ("dense", ("layers", 1, "n_tokens", "dense", 10**9), r"layers\[1\].n_tokens.dense"),
        "packed rows": ("lowrank", ("layers", 0, "n_tokens", "packed", 0), r"layers\[0\].n_tokens.packed"),
        "rows of pages": ("adakv", ("layers", 0, "n_tokens", "packed", 3), r"layers\[0\].n_tokens.packed"),
        "heads": ("dense", ("layers", 0, "n_kv_heads", 10**5), "head_dim|n_kv_heads"),
        "another codec": ("quant4-edge", ("layers", 1, "keys", "bits", 2), r"layers\[1\].packed.k.codes"),
        "bits as a string": (
            "quant4-edge",
            ("layers", 1, "keys", "bits", "4"),
            r"layers\[1\].keys.bits: '4' is not int",
        ),
        "another rank": ("lowrank", ("layers", 0, "keys", "rank", 5), r"layers\[0\].keys.rank: 5"),
        "a policy's knob": ("h2o", ("policy", "budget", [1]), r"policy.budget: \[1\] is not int"),
        "a scorer's knob": ("adakv", ("policy", "scorer", "n_recent", None), "policy.scorer.n_recent"),
        "an unknown knob": ("h2o", ("policy", "bugdet", 3), "policy.bugdet"),
        "a base class": ("h2o", ("policy", "policy", "Policy"), "policy.policy"),
        "a class of no cache": ("dense", ("class", "Nothing"), "class"),
        "an unknown field": ("dense", ("windou", 3), "windou"),
        "a group of one's own": ("dense", ("groups", [[0, 1]]), r"groups\[0\]"),
        "no group": ("lowrank-shared", ("groups", []), "groups|layers"),
        "a method as state": ("hybrid", ("layers", 0, "state", "update", 1), r"layers\[0\].state.update"),
        "another sliding window": ("hybrid", ("layers", 0, "state", "sliding_window", 9), "state.sliding_window"),
        "a sliding layer of ours": ("hybrid", ("layers", 0, "class", "KVLayer"), r"layers\[0\]"),
        "a method as attribute": ("locret", ("attributes", {"update": 1}), "attributes.update"),
    }.values(),
)
def test_what_is_wrong_is_named(saved, name, change, said):
    _, text, tensors, model = saved[name]
    raw = node = json.loads(text)
    *above, last, value = change
    for key in above:
        node = node[key]
    node[last] = value
    with pytest.raises(Misfit, match=said):
        assembled(raw, tensors, model.config)


def test_tensors_of_other_shapes_and_dtypes(saved):
    _, text, tensors, model = saved["h2o"]
    for name, t in tensors.items():
        for other in (t[..., :1], t[:1], t.double() if t.dtype != torch.float64 else t.half(), t.flatten()):
            changed = tensors | {name: other.contiguous()}
            is_same = other.shape == t.shape and other.dtype == t.dtype
            # values may be of another width than keys, and a policy alone knows what it remembers
            is_free = other.shape[:3] == t.shape[:3] and name.endswith("dense.v") and other.dtype == t.dtype
            if is_same or is_free or ".layer_state." in name or ".queries." in name:
                continue
            raw = json.loads(text) | {"shapes": persist._shapes(changed)}
            with pytest.raises(Misfit, match=r"layers\[\d\]"):
                assembled(raw, changed, model.config)
    for changed in ({k: t for k, t in tensors.items() if k != "0.dense.v"}, tensors | {"0.x": torch.zeros(1)}):
        raw = json.loads(text) | {"shapes": persist._shapes(changed)}
        with pytest.raises(Misfit, match=r"layers\[0\]"):
            assembled(raw, changed, model.config)


def test_files_of_the_first_format(saved):
    _, text, tensors, model = saved["lowrank"]
    raw = json.loads(text) | {"format_version": 1}
    for name in ("codec", "edge_codec", "edge_layers", "offloading", "records_past", "attributes"):
        del raw[name]
    for entry in raw["layers"]:
        for name in ("codecs", "record_past", "is_unsettled", "is_decoding", "should_evict", "scaling", "softcap"):
            del entry[name]
    cache = assembled(raw, tensors, model.config)
    assert cache.get_seq_length() == N and cache.layers[0].store.n_packed
