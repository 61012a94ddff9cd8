"""Names of release 0.1: they do what they did, and say what they are called now."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import generate, prompt, tiny_model
from safetensors.torch import load_file, save_file

import hf_kvcache as kv
from hf_kvcache import dmc, former_files, former_names, persist
from hf_kvcache.compat import cache_argument
from hf_kvcache.warn import _said

KNOBS = dict(budget=24, n_sink=2, n_recent=6, interval=4)


@pytest.fixture(autouse=True)
def nothing_said_yet():
    before = set(_said)
    _said.clear()
    yield
    _said.update(before)


def test_a_policy_of_former_times():
    heard = []
    with pytest.warns(UserWarning, match="Old.observe is called on_queries now"):

        @dataclass
        class Old(kv.policies.Policy):
            observes, waits = True, False

            def note(self, view):
                heard.append("note")

            def observe(self, q, view):
                heard.append("observe")
                view.remember(n=torch.ones(*view.new_k.shape[:2], 1))

            def score(self, view):
                assert view.memory.keys() == {"n"}
                return -view.positions.float()

            def worth(self, scores, positions, tokens_seen):
                heard.append("worth")
                return super().worth(scores, positions, tokens_seen)

    assert Old.wants_queries and not Old.defer_prefill_eviction
    with pytest.warns(UserWarning, match="KVView.remember is called set_layer_state now"):
        generate(tiny_model(), prompt(1, 40), cache := kv.KVCache(Old(**KNOBS)))
    assert {"note", "observe", "worth"} == set(heard)
    assert cache.layers[0].store.n_kept < 40 < cache.get_seq_length()


@pytest.mark.parametrize("make", [
    lambda **options: kv.EvictionCache("streaming", **KNOBS, **options),
    lambda **options: kv.KVCache(kv.Streaming(**KNOBS), **options),
])  # fmt: skip
def test_compact_is_rerotate_keys(make):
    with pytest.warns(UserWarning, match="compact= is called rerotate_keys= now"):
        cache = make(compact=True)
    assert cache.rerotate_keys
    with pytest.warns(UserWarning, match="Cache.compact is called rerotate_keys now"):
        assert cache.compact


def test_former_names_of_modules():
    with pytest.warns(UserWarning, match="HeadSplit is called Duo now"):
        assert kv.policies.HeadSplit is kv.Duo
    with pytest.warns(UserWarning, match="fold is called merge_weights now"):
        assert dmc.fold is dmc.merge_weights
    assert kv.HeadSplit is kv.Duo
    for module in (kv, kv.policies, dmc):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            module.nothing  # noqa: B018


def test_both_names_at_once():
    """A class for both releases is taken at today's word; a call says one thing."""

    class Both(kv.Policy):
        observes, wants_queries = True, False

        def score(self, view):
            return view.positions

    assert not Both.wants_queries
    with pytest.raises(TypeError, match="compact= and rerotate_keys= are one argument"):
        kv.EvictionCache("streaming", **KNOBS, compact=True, rerotate_keys=False)
    with pytest.warns(UserWarning, match="compact is called rerotate_keys now"):
        cache = kv.EvictionCache("streaming", **KNOBS)
        cache.compact = True
    assert cache.rerotate_keys


def test_the_glossary_lists_them():
    text = (Path(__file__).parents[1] / "docs" / "glossary.md").read_text(encoding="utf-8")
    table = text.partition("## Former names")[2]
    pairs = former_names.POLICY | {"compact=": "rerotate_keys=", "HeadSplit": "Duo", "memory": "layer_state"}
    assert [name for pair in pairs.items() for name in pair if f"`{name}`" not in table] == []


CACHES = {
    "latents": lambda: kv.LowRankCache(0.5, window=8),
    "rerotated": lambda: kv.EvictionCache("streaming", rerotate_keys=True, **KNOBS),
    "memory": lambda: kv.EvictionCache("expected_attention", **KNOBS),
    "merged": lambda: kv.EvictionCache("keydiff", merge=True, **KNOBS),
    "duo": lambda: kv.EvictionCache("duo", gates=[[1, 0], [0, 1]], window=4, n_sink=2, n_recent=6, interval=4),
}


def as_format_2(folder):
    """Give the files of a saved cache the words of format 2."""
    fields = {now: was for was, now in former_files._FIELDS.items()}
    names = {now: was for was, now in former_files._TENSORS.items()}

    def word(tensor):
        layer, buffer, field = tensor.split(".", 2)
        return f"{layer}.{fields.get(buffer, buffer)}.{names.get(field, field)}"

    path = folder / persist.MANIFEST
    raw = json.loads(path.read_text())
    tensors = {word(name): t for name, t in load_file(folder / raw["tensors"]).items()}
    (folder / raw["tensors"]).unlink()
    save_file(tensors, folder / raw["tensors"])
    checksum = persist._checksum(folder / raw["tensors"])
    name = f"cache-{checksum[:16]}.safetensors"
    (folder / raw["tensors"]).rename(folder / name)
    raw |= {"format_version": 2, "compact": raw.pop("rerotate_keys"), "tensors": name, "sha256": checksum}
    raw["shapes"] = persist._shapes(tensors)
    if raw["policy"] is not None and raw["policy"]["policy"] == "Duo":
        raw["policy"]["policy"] = "HeadSplit"
    for i, layer in enumerate(raw["layers"]):
        raw["layers"][i] = {fields.get(key, key): value for key, value in layer.items()}
        raw["layers"][i]["n_tokens"] = {fields.get(key, key): n for key, n in layer["n_tokens"].items()}
    path.write_text(json.dumps(raw))
    return tensors


@pytest.mark.parametrize("name", CACHES)
def test_files_of_format_2_go_on(name, tmp_path):
    model, ids = tiny_model(), prompt(1, 90)
    with torch.no_grad():
        model(ids, **cache_argument(cache := CACHES[name]()))
        cache.save(tmp_path)
        tensors = as_format_2(tmp_path)
        assert not any(word in name for name in tensors for word in ("position_ids", "layer_state", "n_merged"))
        loaded = kv.KVCache.load(tmp_path, model=model)
        assert loaded.policy == cache.policy and loaded.rerotate_keys == cache.rerotate_keys
        for _ in range(12):
            out, want = (model(ids[:, :1], **cache_argument(c)).logits for c in (loaded, cache))
            assert torch.equal(out, want)


def test_format_2_of_nonsense_stays_nonsense():
    raw = {"format_version": 2, "layers": [None, {"n_tokens": 3}], "policy": {"policy": 7}, "compact": []}
    now = former_files.manifest_of_today(raw)
    assert now == {**{k: v for k, v in raw.items() if k != "compact"}, "rerotate_keys": []}
    assert former_files.tensors_of_today({"odd": 1, "0.dense.rope": 2}) == {"odd": 1, "0.dense.position_ids": 2}
    both = {"compact": 1, "rerotate_keys": 2, "policy": None}
    assert former_files.manifest_of_today(both) == both
    both = {"0.memory.x": 1, "0.layer_state.x": 2}
    assert former_files.tensors_of_today(both) == both
