"""Prompts and long chunks on a CPU, whatever holds their rows: our op gives what attention gives without it."""

import pytest
import torch
from cases import padded, replay, tiny_model
from transformers import DynamicCache, StaticCache

import hf_kvcache as kv
from hf_kvcache import kernels
from hf_kvcache.attention import prompts
from hf_kvcache.attention.interface import kv_mask
from hf_kvcache.kernels import native

REASON = native.why_no_compiler()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SIZES = [70, 40, 1]  # the second call has more tokens than what the ops for a few queries take

# how many layers of how many calls the op serves
CACHES = {
    "dynamic": (lambda config: DynamicCache(config=config), 2),
    # it has columns for tokens that have not come yet
    "static": (lambda config: StaticCache(config=config, max_cache_len=150), 0),
    "dense": (lambda config: kv.KVCache(config=config), 2),
    "quant": (lambda config: kv.QuantCache(8, window=8, config=config), 2),
    "quant-sinks": (lambda config: kv.QuantCache(8, window=8, n_sink=4, config=config), 2),
    "sparse": (lambda config: kv.SparseCache(sparsity=0.25, window=8, config=config), 2),
    "evicted": (lambda config: kv.EvictionCache("streaming", budget=44, n_recent=8, window=8, config=config), 2),
    # heads of different lengths need masks of their own
    "ragged": (lambda config: kv.EvictionCache("adakv", budget=60, n_recent=8, window=8, config=config), 1),
}


@pytest.mark.parametrize("n_wrong", [120, 100])
def test_a_mask_about_other_tokens_is_refused(n_wrong):
    """In a long chunk as in a short one, with padding, which could be cut to size, as without."""
    model, cache = tiny_model("llama"), kv.KVCache(config=tiny_model("llama").config)
    replay(model, cache, padded([70])[0], [70])
    mask = kv_mask(1, 40, n_wrong, q_offset=n_wrong - 40, attention_mask=torch.ones(1, n_wrong, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"covers {n_wrong} tokens"):
        model(padded([40])[0], **kv.compat.cache_argument(cache), attention_mask=mask)


@pytest.mark.parametrize("implementation", ["hf_kvcache", "sdpa"])
@pytest.mark.parametrize("name", ["dense", "quant", "sparse", "ragged"])
def test_autocast(name, implementation):
    """Keys and queries are float32 after RoPE, values are not: rows are held in autocast's dtype."""
    model, (ids, mask, _) = tiny_model("llama", implementation), padded([111, 90])
    if name == "ragged" and implementation == "sdpa":
        mask = torch.ones_like(mask)
    cache, exact = CACHES[name][0](model.config), CACHES[name][0](model.config)
    with torch.autocast("cpu", torch.bfloat16):
        ours = replay(model, cache, ids, SIZES, mask)
    expected = replay(model, exact, ids, SIZES, mask)
    assert ours.dtype == torch.bfloat16 and cache.nbytes < 0.75 * exact.nbytes
    pair = torch.stack([x[mask.bool()].float().flatten() for x in (ours, expected)])
    assert torch.corrcoef(pair)[0, 1] > 0.98


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
@pytest.mark.parametrize("name", CACHES)
def test_the_op_changes_nothing(name, arch, is_padded, monkeypatch):
    make, n_served = CACHES[name]
    model, called = tiny_model(arch), []
    ids, mask, _ = padded([111, 90] if is_padded else [111, 111])
    mask = mask if is_padded else None

    def counted(*args, **options):
        called.append(args[0].shape[2])
        return kernels.prompt_attention.prompt_attention(*args, **options)

    monkeypatch.setattr(prompts, "prompt_attention", counted)
    ours = replay(model, make(model.config), ids, SIZES, mask)
    # layers with a window have masks of their own
    n_layers = sum(kind is None for kind in kv.compat.hf_layers(model.config))
    if is_padded and name == "evicted":
        # what is left of padded rows differs from row to row
        n_served = 1
    assert {n: called.count(n) >= n_layers for n in (70, 40)} == {70: n_served > 0, 40: n_served > 1}
    with monkeypatch.context() as patch:
        patch.setattr(prompts, "choose", lambda *args: kernels.Choice("reference", "not now"))
        theirs = replay(model, make(model.config), ids, SIZES, mask)
    real = torch.ones_like(ids) if mask is None else mask
    torch.testing.assert_close(ours[real.bool()], theirs[real.bool()], rtol=1e-4, atol=1e-4)
