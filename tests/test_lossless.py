"""With nothing to compress, every method equals `DynamicCache`, on every architecture and implementation."""

from functools import cache

import pytest
import torch
from cases import (
    ARCHITECTURES,
    BY_ID,
    CASES,
    LOSSLESS,
    NAMED,
    VOCAB,
    assert_close,
    generate,
    padded,
    prompt,
    replay,
    splits,
    stock_implementation,
    tiny_model,
)
from transformers import DynamicCache

from hf_kvcache.compat import cache_argument

IDS, MASK, ROWS = padded([40, 33])


@cache
def dense_run(arch):
    model = tiny_model(arch, stock_implementation(arch))
    return generate(model, IDS, DynamicCache(config=model.config), attention_mask=MASK, max_new_tokens=16)


# every architecture with no method and with a policy that has nothing to do; every method on Llama
ROWS_AND_MODELS = [(BY_ID[name], arch) for name in ("dense", "keydiff-ratio1") for arch in ARCHITECTURES]
ROWS_AND_MODELS += [(case, "llama") for case in LOSSLESS if (case, "llama") not in ROWS_AND_MODELS]


@pytest.mark.parametrize("kind", ["named", "stock"])
@pytest.mark.parametrize("case, arch", ROWS_AND_MODELS, ids=str)
def test_equals_dynamic_cache(case, arch, kind):
    model = tiny_model(arch, NAMED if kind == "named" else stock_implementation(arch))
    ours = generate(model, IDS, case.make(), attention_mask=MASK, max_new_tokens=16)
    reference = dense_run(arch)
    assert torch.equal(ours.sequences, reference.sequences)
    for step, (a, b) in enumerate(zip(ours.logits, reference.logits)):
        assert_close(f"logits of step {step}", a, b, 1e-5)


@pytest.mark.parametrize("case", LOSSLESS, ids=str)
def test_equals_dynamic_cache_under_eager(case):
    model = tiny_model("llama", "eager")
    ours = generate(model, IDS, case.make(), attention_mask=MASK)
    reference = generate(model, IDS, DynamicCache(), attention_mask=MASK)
    assert torch.equal(ours.sequences, reference.sequences)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill_is_exact(case, arch):
    model = tiny_model(arch)
    options = dict(attention_mask=MASK, use_cache=True)
    ours = model(IDS, **cache_argument(case.make()), **options).logits
    reference = model(IDS, **cache_argument(DynamicCache(config=model.config)), **options).logits
    assert torch.equal(ours, reference)


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("case, arch", [row for row in ROWS_AND_MODELS if row[1] in ("llama", "gemma2")], ids=str)
def test_chunks_equal_one_shot(case, arch, size):
    model = tiny_model(arch)
    ids = prompt(2, 50)
    reference = model(ids, use_cache=False).logits
    assert_close("logits", replay(model, case.make(), ids, splits(50, size)), reference, 1e-5)


@pytest.mark.parametrize("case", LOSSLESS, ids=str)
def test_padded_batch_token_by_token(case):
    # padding must be noticed even where every call brings one token
    model = tiny_model()
    logits = replay(model, case.make(), IDS, [1] * 40, MASK)
    for row, ids in enumerate(ROWS):
        assert_close(f"row {row}", logits[row : row + 1, -ids.shape[1] :], model(ids, use_cache=False).logits, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["dense", "quant4-window8", "keydiff-budget24"])
def test_dtypes(case, dtype):
    model = tiny_model("llama", dtype=dtype)
    cache = BY_ID[case].make()
    ours = replay(model, cache, prompt(2, 70), [60] + [1] * 10)
    reference = model(prompt(2, 70), use_cache=False).logits
    assert ours.dtype == dtype and ours.isfinite().all()
    assert torch.equal(ours[:, :60], model(prompt(2, 70)[:, :60], use_cache=False).logits)
    if case == "dense":
        tolerance = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
        assert_close("logits", ours, reference, tolerance)
    assert cache.layers[0].store.dense["k"].dtype == dtype
    assert ours.shape[-1] == VOCAB


def test_the_reference_can_fail():
    """The tiny models tell a wrong cache from a right one: hiding one old token moves the logits by far more."""
    model = tiny_model()
    ids, mask = prompt(1, 50), torch.ones(1, 50, dtype=torch.long)
    mask[0, 10] = 0
    positions = torch.arange(50)[None]
    hidden = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
    assert (hidden - model(ids, use_cache=False).logits[:, -1]).abs().max() > 1e-2
