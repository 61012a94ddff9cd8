"""The cards in `model_cards/`: what the Hub reads of them, and what people do."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_kvcache.hub.card import card_of

CARDS = Path(__file__).parents[2] / "model_cards"
FAMILIES = ["quant", "mustafar", "palu", "locret", "dmc", "dms"]
NAMES = {
    "causal_lm": "QuantLlamaForCausalLM",
    "base": "LlamaForCausalLM",
    "model_type": "quant_llama",
    "version": "1.0",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_measured_card(family):
    card = ModelCard.load(CARDS / f"{family}.md")
    data = card.data
    assert data.license == "apache-2.0" and data.pipeline_tag == "text-generation" and family in data.tags
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values.keys() == {"perplexity", "kl", "bytes_ratio"}
    assert 0 < values["bytes_ratio"] < 1 and 0 <= values["kl"] < 0.1
    dense, ours, ratio = re.search(r"\| bytes after .* \| ([\d,]+) \| ([\d,]+) \(([\d.]+)\) \|", card.text).groups()
    assert float(ratio) == pytest.approx(int(ours.replace(",", "")) / int(dense.replace(",", "")), abs=1e-3)
    assert f"{values['bytes_ratio']:.3f}" == ratio
    assert re.search(rf"Made by `hf-kvcache export .*--method {family}", card.text)
    # once, where both names are told
    assert "cache=cache" in card.text and card.text.count("past_key_values") == 1
    assert "trust_remote_code=True" in card.text and "{" not in re.sub(r"```.*?```", "", card.text, flags=re.DOTALL)


def test_a_card_without_measurement_says_so():
    card = ModelCard(card_of("org/base", NAMES, "quant", "{}"))
    assert card.data.base_model == "org/base" and card.data.eval_results is None
    assert "--no-measure" in card.text and "None" not in card.text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_card_says_what_one_made_now_says(family):
    """Paper and number come from the registry, and the cards were made before these were there."""
    opening = ModelCard(card_of(None, NAMES, family, "{}")).text.split("whose KV cache holds ")[1].partition("\n")[0]
    assert opening in ModelCard.load(CARDS / f"{family}.md").text and "arXiv" in opening
