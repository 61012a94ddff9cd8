"""What the embedded model can do, and what caches cost it: the claims of its card and of the docs."""

import copy

import numpy as np
import pytest
import torch
from rooms import telling
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import hf_kvcache as kv
from hf_kvcache.calibration import fit_bases, logits_behind
from hf_kvcache.calibration.text import token_batches
from hf_kvcache.eval import fidelity
from hf_kvcache.eval.retrieval import Ledger, build_prompts, exact_match
from hf_kvcache.models import embedded_prose


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(kv.embedded_model())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(
        kv.embedded_model(), dtype=torch.bfloat16, attn_implementation="hf_kvcache"
    )


@pytest.fixture(scope="module")
def ids(tokenizer):
    text = embedded_prose().read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="module")
def prompts(tokenizer, ids):
    ledger = Ledger.from_tokenizer(tokenizer)
    return lambda n_tokens, n_prompts=8: build_prompts(
        ledger, np.array(ids), n_tokens, n_prompts=n_prompts, n_questions=16, n_entries=32, seed=7
    )


@pytest.fixture(scope="module")
def windows(ids, tokenizer):
    return fidelity.build_windows(ids, 1792, 256, 4, tokenizer.bos_token_id)


@pytest.fixture(scope="module")
def dense(model, windows):
    return fidelity.dense_logits(model, windows, 1792)


@pytest.mark.parametrize(("n_tokens", "least"), [(1024, 0.98), (2048, 0.95)])
def test_it_finds_what_it_read(model, prompts, n_tokens, least):
    assert exact_match(model, prompts(n_tokens), DynamicCache) >= least


def test_four_bits_cost_less_than_one_percent(model, windows, dense):
    exact = fidelity.fidelity(model, windows, 1792, dense, DynamicCache)
    packed = fidelity.fidelity(model, windows, 1792, dense, lambda: kv.QuantCache(4))
    assert exact.perplexity < 100, "the model must have learned prose"
    assert packed.perplexity == pytest.approx(exact.perplexity, rel=0.01)
    assert packed.kl < 0.01
    two_bits = fidelity.fidelity(model, windows, 1792, dense, lambda: kv.QuantCache(2))
    assert two_bits.kl > 2 * packed.kl, "the model must react to lossy caches"


def test_four_bits_leave_retrieval_unharmed_and_eviction_does_not(model, prompts):
    asked = prompts(2048, 4)
    dense = exact_match(model, asked, DynamicCache)
    assert exact_match(model, asked, lambda: kv.QuantCache(4)) >= dense - 0.02
    assert exact_match(model, asked, lambda: kv.EvictionCache("streaming", ratio=0.25)) < 0.6 * dense


@pytest.mark.parametrize("sparsity", telling([0.5, 0.7], 0.7))
def test_which_channels_go_matters(model, windows, dense, sparsity):
    """The findings of Mustafar: channels chosen per token beat whole channels, and keys are the more fragile."""

    def score(keys, values):
        codec = tuple(kv.Dense() if rule is None else kv.Sparse(sparsity, rule=rule) for rule in (keys, values))
        return fidelity.fidelity(model, windows, 1792, dense, lambda: kv.KVCache(codec=codec, window=32, n_sink=4))

    keys, values = score("magnitude", None), score(None, "magnitude")
    assert keys.kl < 0.7 * score("think", None).kl
    assert values.kl < 0.5 * score(None, "think").kl
    assert values.kl < keys.kl
    exact = fidelity.fidelity(model, windows, 1792, dense, DynamicCache)
    assert score("magnitude", "magnitude").perplexity < 1.02 * exact.perplexity


@pytest.mark.slow
def test_what_calibration_knows_shows(model, ids):
    """Palu's findings and ours, at half the bytes: data, gradients, joint values and measured ranks all pay."""
    texts, held_out = list(token_batches(ids[:7000], 512, 8)), list(token_batches(ids[7000:], 512, 3))
    model = copy.deepcopy(model).float()
    expected = [log_softmax(model(text).logits, -1) for text in held_out]

    def loss(**options):
        bases = fit_bases(model, texts, **{"allocator": "uniform"} | options)
        behind = [log_softmax(logits_behind(model, text, bases.of, bases.rope), -1) for text in held_out]
        pairs = zip(behind, expected, strict=True)
        return sum(kl_div(ours, theirs, reduction="sum", log_target=True).item() for ours, theirs in pairs)

    uniform = loss()
    assert uniform < 0.5 * loss(directions="rows")
    assert uniform < 0.3 * loss(directions="weights")
    assert uniform < 0.2 * loss(group_size_v=1)
    assert loss(allocator="greedy") < 0.7 * uniform
    fisher = loss(allocator="fisher")
    assert loss(allocator="measured") < 0.7 * fisher
    assert uniform < 0.5 * loss(allocator="condition")


@pytest.mark.parametrize("bits", telling([3, 2], 2))
def test_folded_rotation_pays_at_few_bits(model, ids, windows, dense, bits):
    bases = fit_bases(model, token_batches(ids[:7000], 512, 8), allocator="greedy")

    def kl(mix):
        return fidelity.fidelity(
            model, windows, 1792, dense, lambda: kv.LowRankCache(bases=bases, bits=bits, mix=mix), step=64
        ).kl

    assert kl(True) < kl(False)


def test_it_fits_the_package():
    files = list(kv.embedded_model().iterdir())
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    assert "README.md" in {file.name for file in files}
