"""Attention over what a layer keeps equals dense attention under an explicit mask, per layer and per head."""

import pytest
import torch
from cases import KNOBS, NAMED, assert_close, padded, prompt, replay, splits, tiny_model
from transformers import AttentionInterface, DynamicCache

import hf_kvcache as kv
from hf_kvcache.attention.mask import as_additive, as_boolean, causal, new_token_padding, visible

VISIBLE: dict[int, torch.Tensor] = {}  # layer -> which tokens every new token sees, [B, Hkv, S, T]


def explicit(module, query, key, value, mask, scaling=None, **kwargs):
    """Dense attention under the mask in `VISIBLE`: the reference."""
    shown = VISIBLE[module.layer_idx]
    groups = query.shape[1] // key.shape[1]
    k, v, shown = (x.repeat_interleave(groups, 1) for x in (key, value, shown))
    scores = (query @ k.transpose(2, 3) * scaling).masked_fill(~shown, float("-inf"))
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2), None


AttentionInterface.register("explicit_mask", explicit)


def see(layer, batch, n_new, seen, mask):
    """What the next `n_new` tokens see: the rows kept so far, then themselves, causally and without padding."""
    shown = torch.zeros(batch, 2, n_new, seen + n_new, dtype=torch.bool)
    if layer is not None:
        positions = layer.store.positions
        before = torch.zeros(batch, 2, seen + 1, dtype=torch.bool)
        before.scatter_(2, positions.long().where(positions >= 0, seen), True)
        shown[..., :seen] = before[:, :, None, :seen]
    shown[..., seen:] = torch.ones(n_new, n_new, dtype=torch.bool).tril()
    return shown & mask[:, None, None, : seen + n_new].bool()


def pyramid():
    """A budget and a policy per layer, so that layers and heads differ in which and how many rows they keep."""
    cache = kv.KVCache()
    cache.layers = [
        kv.KVLayer(0, policy=kv.KeyDiff(budget=14, n_sink=1, n_recent=4, interval=2)),
        kv.KVLayer(1, policy=kv.Streaming(budget=22, n_sink=2, n_recent=4, interval=3)),
    ]
    return cache


CACHES = {
    "streaming": lambda: kv.EvictionCache("streaming", budget=24, **KNOBS),
    "keydiff": lambda: kv.EvictionCache("keydiff", budget=24, **KNOBS),
    "unequal": pyramid,
}


@pytest.mark.parametrize("lengths", [[60], [60, 33, 12]], ids=["one", "padded"])
@pytest.mark.parametrize("size", [1, 7, 16, 60])
@pytest.mark.parametrize("name", CACHES)
def test_evicting_equals_an_explicit_mask(name, size, lengths):
    ids, mask, _ = padded(lengths)
    if size == 60:
        sizes = [60, 3, 1, 1, 1, 1, 3, 1, 1, 1, 1, 1, 1, 1, 1, 2]
    else:
        sizes = splits(60, size) + [1] * 12 + [5]
    extra = sum(sizes) - 60
    ids = torch.cat([ids, prompt(len(lengths), extra, seed=9)], 1)
    mask = torch.cat([mask, torch.ones(len(lengths), extra, dtype=torch.long)], 1)
    model, reference = tiny_model("llama", NAMED), tiny_model("llama", "explicit_mask")
    cache, dense, seen, evictions = CACHES[name](), DynamicCache(), 0, set()
    for n in sizes:
        stop = seen + n
        for i in range(2):
            VISIBLE[i] = see(cache.layers[i] if seen else None, len(lengths), n, seen, mask)
        positions = (mask[:, :stop].cumsum(-1) - 1).clamp(min=0)[:, seen:]
        options = dict(position_ids=positions, use_cache=True)
        ours = model(ids[:, seen:stop], attention_mask=mask[:, :stop], past_key_values=cache, **options).logits
        theirs = reference(ids[:, seen:stop], past_key_values=dense, **options).logits
        is_real = mask[:, seen:stop].bool()
        assert_close(f"logits at {seen}", ours[is_real], theirs[is_real], 5e-6)
        seen = stop
        evictions |= {(i, layer.evicted_at) for i, layer in enumerate(cache.layers) if layer.evicted_at}
    assert len(evictions) >= 6, "three evictions per layer, or the test shows nothing"


def test_unequal_budgets_raise_where_the_stock_mask_cannot_express_them():
    ids, mask, _ = padded([60, 40])
    model, cache = tiny_model("llama", "sdpa"), kv.KVCache(codec=None)
    cache.layers = pyramid().layers
    # the named implementation is exact (above), and so are rows without padding
    replay(model, cache, ids, [60], mask)
    tail = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
    named = pyramid()
    replay(tiny_model(), named, ids, [60], mask)
    positions = tail.cumsum(-1)[:, -3:] - 1
    try:
        ours = model(prompt(2, 3), past_key_values=cache, attention_mask=tail, position_ids=positions).logits
    except ValueError as error:
        assert 'attn_implementation="hf_kvcache"' in str(error)
    else:
        theirs = tiny_model()(prompt(2, 3), past_key_values=named, attention_mask=tail, position_ids=positions).logits
        assert_close("logits", ours, theirs, 1e-5)


def test_visible_and_causal():
    positions = torch.tensor([[[0, 2, 5, 6, -1]]])
    # tokens 5 and 6 are new
    assert visible(positions, 7, 2).tolist() == [[[[True, True, True, False, False], [True, True, True, True, False]]]]
    assert causal(4, 2, positions.device)[0, 0].tolist() == [[True, True, True, False], [True] * 4]


def test_boolean_and_additive_masks():
    mask = causal(4, 2, torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        additive = as_additive(mask, 4, 2, torch.zeros(1, dtype=dtype))
        assert additive.dtype == dtype and torch.equal(as_boolean(additive), mask)
    assert as_additive(None, 4, 1, torch.zeros(1)) is None
    assert torch.equal(as_boolean(as_additive(None, 4, 2, torch.zeros(1))), mask)


def test_flash_attention_hands_over_the_padding_itself():
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert new_token_padding(padding, 3, 5).tolist() == [[True, True, True]] * 2
    assert new_token_padding(padding, 5, 5)[0].tolist() == [False, False, True, True, True]
