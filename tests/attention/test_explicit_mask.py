"""Eviction against its definition: dense attention over everything, under a mask that hides what was evicted."""

import copy

import pytest
import torch
from cases import assert_close, new_policies, padded, prompt, splits, tiny_model, unequal_layers
from transformers import AttentionInterface

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument
from hf_kvcache.rope import rotate

KNOBS = dict(n_sink=2, n_recent=6, interval=5)
GATES = [[1, 0], [0, 1]]

POLICIES = {
    "streaming": lambda: kv.Streaming(budget=24, **KNOBS),
    "h2o": lambda: kv.H2O(budget=24, **KNOBS),
    "tova": lambda: kv.TOVA(budget=24, **KNOBS),
    "snapkv": lambda: kv.SnapKV(budget=24, n_queries=6, **KNOBS),
    "pyramidkv": lambda: kv.PyramidKV(budget=24, n_queries=4, beta=2, **KNOBS),
    "keydiff": lambda: kv.KeyDiff(ratio=0.4, **KNOBS),
    "expected": lambda: kv.ExpectedAttention(budget=24, **KNOBS),
    "adakv": lambda: kv.AdaKV(budget=40, scorer=kv.SnapKV(budget=40, n_queries=6, **KNOBS), **KNOBS),
    "adakv-keydiff": lambda: kv.AdaKV(ratio=0.5, scorer="keydiff", **KNOBS),
    "threshold": lambda: kv.Threshold(scorer="h2o", share=0.8, **KNOBS),
    "duo": lambda: kv.Duo(gates=GATES, **KNOBS),
    "fastgen": lambda: kv.FastGen(recovery=0.6, n_queries=6, **KNOBS),
}


# a budget and a policy per layer, beside one policy for all
CACHES = {name: lambda make=make: kv.KVCache(make(), window=4) for name, make in POLICIES.items()}
CACHES["unequal"] = unequal_layers
CACHES |= new_policies(make() for make in POLICIES.values())


class Recorder:
    """Attention that hides from every query what its layer's cache had evicted, head by head.

    `visible[layer]` is a list of boolean masks `[B, Hkv, S, T]`, one per call, filled while the cache runs.
    """

    def __init__(self, n_layers):
        self.visible = [[] for _ in range(n_layers)]
        self.angles = [[] for _ in range(n_layers)]

    def before(self, layer, shape, n_new, total):
        """What the new tokens will see of this layer: what it holds, and themselves in order."""
        seen = 0 if layer is None else layer.tokens_seen
        is_held = torch.zeros(*shape, total + 1, dtype=torch.bool)
        angle = torch.arange(total + 1).expand(*shape, -1).clone()
        if seen:
            positions = layer.store.positions.long()
            # what is no token goes to a place behind all tokens
            where = torch.where(positions < 0, total, positions)
            is_held.scatter_(2, where, True)
            if layer.rerotate_keys:
                angle.scatter_(2, where, layer.store.state("angle").long())
        fresh = torch.zeros(n_new, total, dtype=torch.bool)
        fresh[:, seen : seen + n_new] = torch.ones(n_new, n_new, dtype=torch.bool).tril()
        return is_held[:, :, None, :total] | fresh, angle[..., :total]


def record(model, cache, ids, sizes, mask=None, start=0):
    """Logits of the tokens from `start` on under the cache, and what every layer saw at every call."""
    recorder, logits = Recorder(model.config.num_hidden_layers), []
    for size in sizes:
        # policies that wait for the next chunk act now
        for layer in cache.layers:
            layer.finish(is_final=size == 1)
        for i, (visible, angles) in enumerate(zip(recorder.visible, recorder.angles)):
            layer = cache.layers[i] if i < len(cache.layers) else None
            seen, angle = recorder.before(layer, (ids.shape[0], model.config.num_key_value_heads), size, ids.shape[1])
            visible.append(seen)
            angles.append(angle)
        part = ids[:, start : start + size]
        whole = None if mask is None else mask[:, : start + size]
        options = {}
        if whole is not None:
            positions = (whole.cumsum(-1) - 1).clamp(min=0)[:, start:]
            options = dict(attention_mask=whole, position_ids=positions)
        logits.append(model(part, **cache_argument(cache), use_cache=True, **options).logits)
        start += size
    return torch.cat(logits, 1), recorder


class Explicit:
    """Dense attention over all rows so far under the masks of a recorder, and with keys rotated as it says."""

    current = None

    def __init__(self, recorder, mask=None, inv_freq=None):
        self.recorder, self.mask, self.inv_freq = recorder, mask, inv_freq
        self.step, self.held = 0, {}

    def attend(self, module, query, key, value, scaling):
        i = module.layer_idx
        past = self.held.get(i)
        k, v = (key, value) if past is None else (torch.cat([p, x], 2) for p, x in zip(past, (key, value)))
        self.held[i], n = (k, v), k.shape[2]
        visible = self.recorder.visible[i][self.step][..., :n]
        if self.mask is not None:
            visible = visible & self.mask.bool()[:, None, None, :n]
        if self.inv_freq is not None:
            angles = (self.recorder.angles[i][self.step][..., :n] - torch.arange(n)).unsqueeze(-1) * self.inv_freq
            k = rotate(k, angles.cos(), angles.sin())
        visible = visible.expand(*k.shape[:2], -1, -1)
        k, v, visible = (x.repeat_interleave(query.shape[1] // k.shape[1], 1) for x in (k, v, visible))
        scores = (query @ k.mT * scaling).masked_fill(~visible, float("-inf"))
        out = torch.softmax(scores, -1).nan_to_num(0.0) @ v
        return out.transpose(1, 2).contiguous(), None


def explicit_mask(module, query, key, value, attention_mask, scaling=None, **kwargs):
    return Explicit.current.attend(module, query, key, value, scaling)


AttentionInterface.register("explicit-mask", explicit_mask)


def explicit(model, recorder, ids, sizes, mask=None, inv_freq=None):
    """Logits of the same calls with everything kept, the recorded masks and the recorded angles."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("explicit-mask")
    Explicit.current, logits, start = Explicit(recorder, mask, inv_freq), [], 0
    for size in sizes:
        where = torch.arange(start, start + size).unsqueeze(0)
        if mask is not None:
            where = (mask[:, : start + size].cumsum(-1) - 1).clamp(min=0)[:, start:]
        logits.append(twin(ids[:, start : start + size], position_ids=where, use_cache=False).logits)
        Explicit.current.step += 1
        start += size
    return torch.cat(logits, 1)


def n_evictions(recorder):
    """Evictions of the layer that had the fewest: calls before which some row that was seen earlier had gone."""
    fewest = []
    for calls in recorder.visible:
        last = [seen[:, :, -1] for seen in calls]
        fewest.append(sum(bool((before & ~after).any()) for before, after in zip(last, last[1:])))
    return min(fewest)


SPLITS = {
    "1": splits(90, 1),
    "7": splits(90, 7),
    "16": splits(90, 16),
    "whole": [60] + [1] * 22 + [8],
}


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("name", CACHES)
def test_equals_the_explicit_mask(name, sizes):
    model, ids, cache = tiny_model(), prompt(2, 90), CACHES[name]()
    ours, recorder = record(model, cache, ids, sizes)
    assert_close("logits", ours, explicit(model, recorder, ids, sizes), 1e-6)
    assert n_evictions(recorder) >= 3


@pytest.mark.parametrize("sizes", [[40, 7, 16] + [1] * 19 + [8], splits(90, 1)], ids=["mixed", "1"])
@pytest.mark.parametrize("name", ["streaming", "keydiff", "snapkv", "adakv", "expected", "duo", "unequal"])
def test_equals_the_explicit_mask_left_padded(name, sizes):
    model, (ids, mask, _), cache = tiny_model(), padded([90, 61, 33]), CACHES[name]()
    ours, recorder = record(model, cache, ids, sizes, mask)
    expected = explicit(model, recorder, ids, sizes, mask)
    real = mask.bool()
    assert_close("logits", ours[real], expected[real], 1e-6)


@pytest.mark.parametrize("sizes", [[1] * 30, [16, 14]], ids=["1", "16"])
@pytest.mark.parametrize("level", ["model", "layer", "head"])
def test_a_prompt_read_twice_equals_the_explicit_mask(level, sizes):
    model, (ids, mask, _) = tiny_model(), padded([90, 81])
    cache = kv.KVCache(kv.KVzip(budget=40, level=level, n_sink=2), window=4)
    # all but the last token of what it is given
    kv.prefill(model, ids[:, :61], cache, attention_mask=mask[:, :61])
    ours, recorder = record(model, cache, ids, sizes, mask, start=60)
    causal = torch.ones(60, 90, dtype=torch.bool).tril().expand(2, 2, -1, -1)
    for visible, angles in zip(recorder.visible, recorder.angles):
        # what stays is the same until the end
        assert not visible[-1][:, :, -1, :60].all() and (visible[0][:, :, 0, :60] == visible[-1][:, :, -1, :60]).all()
        visible.insert(0, causal)
        angles.insert(0, None)
    expected = explicit(model, recorder, ids, [60, *sizes], mask)[:, 60:]
    assert_close("logits", ours, expected, 1e-6)


@pytest.mark.parametrize("name", ["streaming", "keydiff", "snapkv", "adakv", "duo"])
@pytest.mark.parametrize("sizes", [SPLITS["7"], SPLITS["whole"]], ids=["7", "whole"])
def test_compact_equals_rotated_keys(name, sizes):
    model, ids = tiny_model(), prompt(2, 90)
    cache = kv.KVCache(POLICIES[name](), window=4, rerotate_keys=True)
    ours, recorder = record(model, cache, ids, sizes)
    inv_freq = model.model.rotary_emb.inv_freq
    assert_close("logits", ours, explicit(model, recorder, ids, sizes, inv_freq=inv_freq), 1e-6)
    # the kept rows stand side by side, up to the newest token
    for layer in cache.layers:
        layer.finish()
        positions, angle = layer.store.positions, layer.store.state("angle")
        for head, where in zip(positions.flatten(0, 1), angle.flatten(0, 1)):
            n = int((head >= 0).sum())
            since = 90 - layer.evicted_at
            own = where[head >= 0]
            assert own.tolist() == list(range(90 - n, 90)) and since < 90
