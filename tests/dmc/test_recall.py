"""Retrofits learn what to keep: recall with filler, trained from nothing and served from real caches."""

from types import SimpleNamespace

import pytest
import torch

import hf_kvcache as kv
from hf_kvcache.dmc import hooks, recall

PLAN, SEED = recall.Plan(), 0
# the verdict on a token is the next one's, which in the first layer knows nothing of it: DMS lets its two heads share
# the tokens there, and nothing go; past 4.6 or so of what is asked, it costs answers
ASKED = {"dmc": 4.0, "dms": 4.3}


def measured(model, cache, texts):
    """Accuracy and tokens per row from a cache; decisions, and what is read at once, where the model decides."""
    with torch.no_grad():
        said = recall.serve(model, texts, cache)
        together = recall.logits(model, texts)
    verdict = recall.verdict(model, texts) if recall.retrofits(model) else None
    return SimpleNamespace(
        accuracy=recall.accuracy(said, texts),
        ratio=recall.tokens_per_row(cache),
        verdict=verdict,
        gap=(said - together).abs().max().item(),
    )


def retrofitted(method, cache, base, texts):
    """A retrofit, measured; also what it answers with its decisions dealt out to other tokens."""
    model = recall.train_on(base, PLAN, SEED, ASKED[method], recall.SETTINGS[method])
    found, decide, generator = measured(model, cache, texts), hooks.decide, torch.Generator().manual_seed(0)

    def dealt_out(*values):
        logits, weights = decide(*values)
        return logits.gather(-1, torch.rand(logits.shape, generator=generator).argsort(-1)), weights

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(hooks, "decide", dealt_out)
        found.dealt_out = recall.accuracy(recall.logits(model, texts), texts)
    return found


@pytest.fixture(scope="module")
def texts():
    return recall.sample(256, torch.Generator().manual_seed(99))


@pytest.fixture(scope="module")
def base():
    return recall.train_base(PLAN, SEED)


@pytest.fixture(scope="module")
def dmc(base, texts):
    return retrofitted("dmc", kv.DMCCache(), base, texts)


@pytest.fixture(scope="module")
def dms(base, texts):
    return retrofitted("dms", kv.DMSCache(), base, texts)


@pytest.fixture(scope="module")
def pooled(base, texts):
    return measured(recall.train_pooling(base, PLAN, SEED), kv.DMCCache(), texts)


@pytest.mark.slow
def test_the_base_recalls_everything(base, texts):
    found = measured(base, kv.KVCache(), texts)
    assert found.accuracy > 0.96
    assert found.ratio == 1


@pytest.mark.slow
def test_dmc_recalls_from_merged_rows(dmc):
    assert dmc.ratio >= 3.5
    assert dmc.accuracy >= 0.95


@pytest.mark.slow
def test_dmc_is_worth_more_than_fixed_pooling(dmc, pooled):
    assert pooled.ratio == 4
    assert dmc.accuracy >= pooled.accuracy + 0.05
    # it did learn to use its rows: a window would be near chance
    assert pooled.accuracy > 0.6


@pytest.mark.slow
def test_dmc_gives_rows_to_pairs(dmc):
    assert (dmc.verdict.pairs.mean() > dmc.verdict.fillers.mean() + 0.03).item()
    assert dmc.verdict.ratio == pytest.approx(dmc.ratio, rel=1e-4)


@pytest.mark.slow
def test_dms_recalls_from_what_it_has_not_dropped(dms):
    assert dms.ratio >= 3.5
    assert dms.accuracy >= 0.93
    # condemned tokens stay for a window: what is counted in training is not what is held
    assert dms.verdict.ratio > dms.ratio * 1.03


@pytest.mark.slow
def test_the_same_decisions_about_other_tokens_are_worth_less(dmc, dms):
    assert dmc.dealt_out < dmc.accuracy - 0.03
    assert dms.dealt_out < dms.accuracy - 0.05


@pytest.mark.slow
def test_served_token_by_token_as_read_at_once(dmc, dms, pooled):
    assert max(dmc.gap, dms.gap, pooled.gap) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["h2o", "tova", "streaming"])
def test_policies_without_training_recall_less(policy, base, texts, dmc):
    n_sink = 4 if policy == "streaming" else 0
    cache = kv.EvictionCache(policy, ratio=1 / dmc.ratio, n_sink=n_sink, n_recent=0, interval=1)
    found = measured(base, cache, texts)
    assert found.ratio == pytest.approx(dmc.ratio, rel=0.05)
    assert found.accuracy < dmc.accuracy - 0.1


def test_texts_ask_for_what_they_say():
    texts = recall.sample(8, torch.Generator().manual_seed(0))
    assert texts.shape == (8, recall.TOKENS)
    for text in texts.tolist():
        pairs = [t - recall.PAIR for t in text[: recall.CONTEXT] if t >= recall.PAIR]
        said = {pair // recall.N_VALUES: pair % recall.N_VALUES for pair in pairs}
        assert len(said) == len(pairs) == recall.PAIRS
        for question, answer in zip(text[recall.CONTEXT :: 2], text[recall.CONTEXT + 1 :: 2], strict=True):
            assert said[question - recall.QUESTION] == answer - recall.ANSWER
