"""Masks: of layers and heads that keep different rows, and what transformers hands over."""

import torch
from accelerate.utils import send_to_device
from cases import assert_close, padded, prompt, replay, tiny_model, unequal_layers

import hf_kvcache as kv
from hf_kvcache.attention.interface import kv_mask
from hf_kvcache.attention.kept_columns import visible
from hf_kvcache.attention.mask import as_additive, as_boolean, causal
from hf_kvcache.attention.padding import new_token_padding
from hf_kvcache.compat import cache_argument


def test_unequal_budgets_raise_where_the_stock_mask_cannot_express_them():
    ids, mask, _ = padded([60, 40])
    model, cache = tiny_model("llama", "sdpa"), kv.KVCache(codec=None)
    cache.layers = unequal_layers().layers
    # the named implementation is exact (above), and so are rows without padding
    replay(model, cache, ids, [60], mask)
    tail = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
    named = unequal_layers()
    replay(tiny_model(), named, ids, [60], mask)
    positions = tail.cumsum(-1)[:, -3:] - 1
    try:
        ours = model(prompt(2, 3), **cache_argument(cache), attention_mask=tail, position_ids=positions).logits
    except ValueError as error:
        assert 'attn_implementation="hf_kvcache"' in str(error)
    else:
        theirs = tiny_model()(prompt(2, 3), **cache_argument(named), attention_mask=tail, position_ids=positions).logits
        assert_close("logits", ours, theirs, 1e-5)


def test_visible_and_causal():
    positions = torch.tensor([[[0, 2, 5, 6, -1]]])
    # tokens 5 and 6 are new
    assert visible(positions, 7, 2).tolist() == [[[[True, True, True, False, False], [True, True, True, True, False]]]]
    assert causal(4, 2, positions.device)[0, 0].tolist() == [[True, True, True, False], [True] * 4]


def test_boolean_and_additive_masks():
    mask = causal(4, 2, torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        additive = as_additive(mask, torch.zeros(1, dtype=dtype))
        assert additive.dtype == dtype and torch.equal(as_boolean(additive), mask)
    assert as_additive(None, torch.zeros(1)) is None, "nobody hides anything"


def test_flash_attention_hands_over_the_padding_itself():
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert new_token_padding(padding, 3, 5).tolist() == [[True, True, True]] * 2
    assert new_token_padding(padding, 5, 5)[0].tolist() == [False, False, True, True, True]


def test_a_mask_follows_the_layers():
    """accelerate moves what the layers of another device are called with: `meta` is such a device."""
    ids, mask, _ = padded([6, 4])
    whole = kv_mask(2, 6, 6, attention_mask=mask.bool(), device=ids.device)
    moved = send_to_device({"attention_mask": whole}, "meta")["attention_mask"]
    assert moved is send_to_device(whole, "meta"), "once for all layers"
    assert moved.padding.device.type == moved.dense().device.type == "meta"
    assert moved.dense().shape == whole.dense().shape == (2, 1, 6, 6)
    back = send_to_device(whole, "cpu")
    assert torch.equal(back.dense(), whole.dense()) and torch.equal(back.padding, whole.padding)
    assert send_to_device(kv_mask(2, 1, 6, q_offset=5), "meta").padding is None
