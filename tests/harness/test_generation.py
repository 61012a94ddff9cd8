"""What is generated comes through a new cache for every batch."""

import pytest
import torch
from harness_toys import PROSE, behind, generated, stock

from hf_kvcache.compat import cache_argument
from hf_kvcache.eval.specs import parse
from hf_kvcache.long_prompts import prefill

# of different lengths: the shorter ones of a batch are padded on the left
PROMPTS = PROSE[:300], PROSE[600:750], PROSE[900:1150]


@pytest.fixture(scope="module")
def expected():
    return generated(stock(batch_size=2), *PROMPTS)


@pytest.mark.parametrize("cache", ["dynamic", "dense", "quant:bits=8", "streaming:budget=4096"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_loses_nothing_says_what_the_harness_does(cache, batch_size, expected):
    assert generated(behind(cache, batch_size=batch_size), *PROMPTS) == expected


@pytest.mark.parametrize(
    "cache", ["quant:bits=2,window=0", "snapkv:ratio=0.1,n_recent=8", "kvzip:ratio=0.1,n_recent=8"]
)
def test_it_says_what_generate_says_behind_the_cache(cache, expected):
    lm = behind(cache, batch_size=3)
    found = generated(lm, *PROMPTS)
    assert found != expected
    batch = lm.tokenizer(list(PROMPTS), padding="longest", padding_side="left", return_tensors="pt")
    filled = parse(cache).build(lm.model.config)
    if cache.startswith("kvzip"):
        prefill(lm.model, batch["input_ids"], filled, attention_mask=batch["attention_mask"])
    out = lm.model.generate(**batch, **cache_argument(filled), max_new_tokens=12, do_sample=False)
    said = lm.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found == [text.partition("\n\n")[0] for text in said]


def test_every_batch_has_a_cache_of_its_own():
    lm = behind("quant:bits=2,window=0", batch_size=1)
    together = generated(lm, *PROMPTS)
    assert together == [generated(lm, prompt)[0] for prompt in PROMPTS]


def test_beams_and_samples_go_through_it_too():
    lm = behind("snapkv:ratio=0.25", batch_size=2)
    beams = generated(lm, *PROMPTS[:2], num_beams=2)
    torch.manual_seed(0)
    assert beams != generated(lm, *PROMPTS[:2], do_sample=True, temperature=1.5)


def test_what_it_held_is_reported():
    held = {}
    for cache in ("dense", "quant:bits=2,window=0"):
        lm = behind(cache)
        assert lm.get_model_info()["kv_cache_bytes_per_token"] is None
        generated(lm, PROMPTS[0])
        found = lm.get_model_info()
        assert found["kv_cache"] == cache
        held[cache] = found["kv_cache_bytes_per_token"]
    assert held["quant:bits=2,window=0"] < 0.5 * held["dense"]
