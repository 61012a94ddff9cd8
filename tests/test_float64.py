"""Every kind of cache on float64 models: what is lossless is the stock cache's, the rest is what it is in float32."""

import pytest
import torch
from cases import CASES, HYBRIDS, generate, padded, prompt, replay, stock_implementation, tiny_model
from transformers import DynamicCache

IDS, MASK, _ = padded([60, 37])
SIZES = [50, *[1] * 20, 10]
# models of transformers normalise in float32, whatever their dtype
CLOSE = 2e-6
# a code on the edge may fall to either side
ONE_CODE = 2e-4


def logits(model, cache):
    return replay(model, cache, prompt(2, sum(SIZES), 3), SIZES)


def tokens(model, cache):
    return generate(model, IDS, cache, attention_mask=MASK).sequences


@pytest.fixture(scope="module")
def stock():
    model = tiny_model("llama", stock_implementation("llama"), torch.float64)
    return logits(model, DynamicCache(config=model.config)), tokens(model, None)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_cache(case, stock):
    double, single = (tiny_model("llama", dtype=dtype) for dtype in (torch.float64, torch.float32))
    got = logits(double, case.make())
    assert got.dtype == torch.float64
    expected, same = stock if case.lossless else (logits(single, case.make()), tokens(single, case.make()))
    assert (got - expected).abs().max() < (CLOSE if case.lossless else ONE_CODE)
    assert torch.equal(tokens(double, case.make()), same)


@pytest.mark.parametrize("case", [case for case in CASES if case.lossless], ids=str)
@pytest.mark.parametrize("arch", HYBRIDS)
def test_softcap_and_windows(arch, case):
    ours, theirs = (tiny_model(arch, how, torch.float64) for how in ("hf_kvcache", stock_implementation(arch)))
    expected = logits(theirs, DynamicCache(config=theirs.config))
    assert (logits(ours, case.make()) - expected).abs().max() < CLOSE
