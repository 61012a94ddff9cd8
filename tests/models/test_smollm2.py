"""The real language model, where `hf-kvcache models get smollm2` has brought it."""

import pytest
import real_models
import torch
from transformers import DynamicCache

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument
from hf_kvcache.models import embedded_prose

pytestmark = pytest.mark.slow
KEY = "49273"


@pytest.fixture(scope="module")
def smollm2():
    return real_models.smollm2(dtype=torch.float32)


def answer(smollm2, inputs, cache):
    model, tokenizer = smollm2
    out = model.generate(**inputs, **cache_argument(cache), max_new_tokens=8, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_answers(smollm2):
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = smollm2[1].apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert answer(smollm2, inputs, kv.KVCache()) == "The capital of France is Paris."


def test_it_finds_a_key_as_with_the_cache_of_transformers(smollm2):
    prose = embedded_prose().read_text(encoding="utf-8")
    text = f"{prose[:2000]}\n\nThe pass key is {KEY}. Remember it.\n\n{prose[2000:4300]}\n\nThe pass key is"
    inputs = smollm2[1](text, return_tensors="pt")
    assert 1000 < inputs["input_ids"].shape[1] < 1200
    ours, theirs = (answer(smollm2, inputs, cache) for cache in (kv.KVCache(), DynamicCache()))
    assert KEY in ours and ours == theirs
