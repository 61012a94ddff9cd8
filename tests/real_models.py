"""Real models for slow tests, where `hf-kvcache models get` has brought them: nothing here downloads one."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvcache.models import path_of


def smollm2(**options):
    """SmolLM2 and its tokenizer; without it the test is skipped, and says how to get it."""
    try:
        where = path_of("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model = AutoModelForCausalLM.from_pretrained(where, attn_implementation="hf_kvcache", **options)
    return model.eval(), AutoTokenizer.from_pretrained(where)
