"""Every causal architecture under five caches and two attention functions: what is written down is what happens."""

from pathlib import Path

import pytest
import table
import torch
import transformers
from families import BROKEN_BEFORE, FAMILIES, LEFT_OUT
from outcomes import ATTENTIONS, CACHES, all_families, model_of, outcome, sensitivity, untouched
from packaging.version import Version
from pixels import CONFIGS
from transformers import CONFIG_MAPPING, DynamicCache
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
IS_OLDER = Version(transformers.__version__) < Version(table.RELEASE)
# older releases have fewer
PRESENT = [
    family for family in all_families() if family in CONFIG_MAPPING and not (IS_OLDER and family in BROKEN_BEFORE)
]
EXPECTED = table.expected()


def test_the_table_covers_the_mapping():
    names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    new = sorted(names - set(FAMILIES) - set(LEFT_OUT))
    assert not new, f"architectures that are new: {new}; give each a row in families.py, or a reason to leave it out"
    assert not set(FAMILIES) & set(LEFT_OUT)
    assert sorted(EXPECTED) == sorted(all_families())


@pytest.mark.parametrize("family", PRESENT)
def test_the_cache_matters(family):
    """The model's next token depends on what lies far back, so that a wrong cache would show."""
    assert sensitivity(family) > 1e-2


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", PRESENT)
def test_outcomes(family, attention):
    found = {name: outcome(family, attention, name) for name in CACHES}
    if not IS_OLDER:
        assert found == dict(zip(CACHES, EXPECTED[family][attention], strict=True))
    # an older release may have fewer models whose attention can be served, but none is served wrongly
    assert not any("WRONG" in word for word in found.values()), found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_models_without_a_cache_of_ours_are_left_alone(family, attention):
    """Vision towers have no mask, and see everything."""
    model, inputs, stock = model_of(family)
    model.set_attn_implementation(attention)
    try:
        kv.KVCache()
        with torch.no_grad(), untouched():
            known = model(**inputs, use_cache=False).logits
        with torch.no_grad():
            assert torch.equal(model(**inputs, use_cache=False).logits, known)
    finally:
        model.set_attn_implementation(stock)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "persimmon", "stablelm"])
def test_attention_weights_are_returned_where_they_are_asked_for(family):
    """Some models keep `output_attentions` to themselves, and wait for what attention returns."""
    model, inputs, stock = model_of(family)
    model.set_attn_implementation("eager")
    try:
        for size in (60, 1):
            cache, known = kv.KVCache(), DynamicCache()
            ids = inputs["input_ids"]
            with torch.no_grad():
                model(ids[:, :60], **cache_argument(cache)), model(ids[:, :60], **cache_argument(known))
                step = dict(input_ids=ids[:, 60 : 60 + size], output_attentions=True)
                ours = model(**step, **cache_argument(cache)).attentions
                theirs = model(**step, **cache_argument(known)).attentions
            assert len(ours) == len(theirs) == 2
            for weights, reference in zip(ours, theirs, strict=True):
                assert torch.allclose(weights, reference, atol=1e-5)
    finally:
        model.set_attn_implementation(stock)


def test_nothing_wrong_is_expected():
    for family, by_attention in EXPECTED.items():
        for attention, outcomes in by_attention.items():
            assert not any("WRONG" in word for word in outcomes), (family, attention, outcomes)


def test_the_page_has_the_table():
    block = PAGE.read_text(encoding="utf-8").split("<!-- architectures -->")[1].split("<!-- /architectures -->")[0]
    assert block.strip() == table.markdown(), "paste the output of `python tests/architectures/table.py --markdown`"
