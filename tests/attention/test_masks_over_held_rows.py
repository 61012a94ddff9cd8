"""Masks that hide rows which a cache already holds: obeyed by position, whatever has been evicted."""

import copy

import pytest
import torch
from cases import KNOBS, NAMED, assert_close, new_model, prompt, tiny_model
from test_explicit_mask import explicit, record
from transformers import LlamaConfig

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument

CACHES = {
    "streaming": lambda: kv.EvictionCache("streaming", budget=30, **KNOBS),
    "keydiff": lambda: kv.EvictionCache("keydiff", budget=30, **KNOBS),
    "snapkv": lambda: kv.EvictionCache("snapkv", budget=30, n_queries=6, **KNOBS),
    "h2o": lambda: kv.EvictionCache("h2o", budget=30, **KNOBS),
    "adakv": lambda: kv.EvictionCache("adakv", ratio=0.5, scorer="keydiff", window=4, **KNOBS),
    "duo": lambda: kv.EvictionCache("duo", gates=[[1, 0], [0, 1]], window=4, **KNOBS),
    "budget256": lambda: kv.EvictionCache("keydiff", budget=256, **KNOBS),
}
N, S = 60, 3
# a passage, some of which every policy has kept: sinks, a middle, recent tokens
HIDDEN = [1, 2, 20, 21, 22, 23, 24, 25, 53, 54]


def hiding(batch=2):
    """Two dimensions: the first row hides a passage, the others show everything."""
    mask = torch.ones(batch, N + S, dtype=torch.long)
    mask[0, HIDDEN] = 0
    return mask


def four_dimensional(dtype):
    causal = torch.ones(S, N + S, dtype=torch.bool).tril(N)
    mask = causal & hiding().bool()[:, None, None]
    if dtype is torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


KINDS = {
    "2d": hiding,
    "4d": lambda: four_dimensional(torch.bool),
    "4d-additive": lambda: four_dimensional(torch.float32),
}


@pytest.mark.parametrize("implementation", [NAMED, "sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CACHES)
def test_a_hidden_passage_is_hidden(name, kind, implementation):
    if (kind, implementation) == ("4d", "eager"):
        # transformers' own eager attention adds masks, so there it is the additive one that a caller has to give
        return
    model, ids, cache = tiny_model("llama", implementation), prompt(2, N + S), CACHES[name]()
    model(ids[:, :N], **cache_argument(cache))
    twin = copy.deepcopy(cache)
    positions = torch.arange(N, N + S)[None]
    ours = model(ids[:, N:], **cache_argument(cache), attention_mask=KINDS[kind](), position_ids=positions).logits
    _, recorder = record(tiny_model(), CACHES[name](), ids, [N, S])
    for calls in recorder.visible:
        calls[1] = calls[1] & hiding().bool()[:, None, None]
    expected = explicit(tiny_model(), recorder, ids, [N, S])[:, N:]
    assert_close("logits", ours, expected, 2e-6)
    unmasked = model(ids[:, N:], **cache_argument(twin), position_ids=positions).logits
    assert (ours[0] - unmasked[0]).abs().max() > 1e-2, "the mask has an effect"
    assert_close("a row without holes", ours[1], unmasked[1], 2e-6)


@pytest.mark.parametrize("implementation", [NAMED, "sdpa"])
@pytest.mark.parametrize("name", ["keydiff", "adakv", "budget256"])
def test_one_token_at_a_time(name, implementation):
    model, ids, cache = tiny_model("llama", implementation), prompt(2, N + S), CACHES[name]()
    model(ids[:, :N], **cache_argument(cache))
    together = model(
        ids[:, N:],
        **cache_argument(copy.deepcopy(cache)),
        attention_mask=hiding(),
        position_ids=torch.arange(N, N + S)[None],
    ).logits
    for i in range(S):
        at = slice(N + i, N + i + 1)
        options = dict(attention_mask=hiding()[:, : at.stop], position_ids=torch.arange(at.start, at.stop)[None])
        alone = model(ids[:, at], **cache_argument(cache), **options).logits
        # eviction may come between the tokens, not before the first
        if i == 0 or name == "budget256":
            assert_close("logits", alone[:, 0], together[:, i], 2e-6)


@pytest.mark.parametrize("implementation", [NAMED, "sdpa"])
@pytest.mark.parametrize("name", CACHES)
def test_a_mask_that_changes_scores_changes_them(name, implementation):
    """A float mask may do more than hide: here every key is penalised by its distance, as ALiBi does."""
    model, ids = tiny_model("llama", implementation), prompt(1, N + S)
    distance = torch.arange(N, N + S).unsqueeze(-1) - torch.arange(N + S)
    bias = torch.where(distance >= 0, -0.3 * distance.float(), torch.finfo(torch.float32).min)[None, None]
    cache, positions = CACHES["budget256"](), torch.arange(N, N + S)[None]
    model(ids[:, :N], **cache_argument(cache))
    expected = model(ids[:, N:], **cache_argument(cache), attention_mask=bias, position_ids=positions).logits
    cache = CACHES[name]()
    model(ids[:, :N], **cache_argument(cache))
    ours = model(ids[:, N:], **cache_argument(cache), attention_mask=bias, position_ids=positions).logits
    # far keys hardly count, and near ones are all kept
    assert_close("logits", ours, expected, 0.05)


def test_heads_may_have_masks_of_their_own():
    model, ids, cache = tiny_model(), prompt(1, N + S), CACHES["keydiff"]()
    model(ids[:, :N], **cache_argument(cache))
    mask = torch.ones(S, N + S, dtype=torch.bool).tril(N).expand(1, 4, -1, -1).clone()
    mask[:, 2, :, HIDDEN] = False
    model(ids[:, N:], **cache_argument(copy.deepcopy(cache)), attention_mask=mask)
    positions = torch.arange(N, N + S)[None]
    ours = model(ids[:, N:], **cache_argument(cache), attention_mask=mask, position_ids=positions).logits
    alike = KINDS["4d"]()[:1].expand(1, 4, -1, -1)
    other = CACHES["keydiff"]()
    model(ids[:, :N], **cache_argument(other))
    all_heads = model(ids[:, N:], **cache_argument(other), attention_mask=alike, position_ids=positions).logits
    assert (ours - all_heads).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", [NAMED, "sdpa"])
def test_a_mask_of_another_length_is_refused(implementation):
    model, ids, cache = tiny_model("llama", implementation), prompt(1, N + S), CACHES["keydiff"]()
    model(ids[:, :N], **cache_argument(cache))
    mask = torch.ones(1, 1, S, 33, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"covers 33 tokens, layer 0 has seen {N + S} .and keeps"):
        model(ids[:, N:], **cache_argument(cache), attention_mask=mask, position_ids=torch.arange(N, N + S)[None])


def test_tokens_that_only_the_last_query_does_not_see_are_no_padding():
    model, ids, cache = tiny_model(), prompt(1, N), CACHES["budget256"]()
    mask = torch.ones(N, N, dtype=torch.bool).tril()[None, None].clone()
    mask[..., -1, 30:40] = False
    model(ids, **cache_argument(cache), attention_mask=mask)
    assert (cache.layers[0].store.positions >= 0).all() and not cache.layers[0].has_padding
    mask[..., :, :7] = False
    cache = CACHES["budget256"]()
    model(ids, **cache_argument(cache), attention_mask=mask)
    assert (cache.layers[0].store.positions[..., :7] == -1).all() and cache.layers[0].has_padding


def test_left_padding_and_pages_need_no_other_way():
    """Padding is not in pages, so a batch with padding is still served by the op over pages."""
    model = new_model(LlamaConfig(**tiny_model().config.to_dict()))
    ids, mask, cache = prompt(2, N), torch.ones(2, N, dtype=torch.long), CACHES["adakv"]()
    mask[0, :13] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model(ids, **cache_argument(cache), attention_mask=mask, position_ids=positions)
    longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    alone = CACHES["adakv"]()
    model(ids[:1, 13:], **cache_argument(alone))
    batch = model(
        ids[:, :1], **cache_argument(cache), attention_mask=longer, position_ids=longer.sum(-1, keepdim=True) - 1
    )
    single = model(ids[:1, :1], **cache_argument(alone))
    assert batch.logits.isfinite().all() and single.logits.isfinite().all()
