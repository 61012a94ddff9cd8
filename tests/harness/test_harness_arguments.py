"""Arguments of the model `hf-kvcache`: what it takes, and what it refuses."""

import builtins
import importlib
import sys

import pytest
from harness_toys import LOADED, PROSE, behind, likelihoods
from lm_eval.api.registry import get_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvcache
from hf_kvcache.cli import main
from hf_kvcache.commands.common import default_device
from hf_kvcache.dmc import Settings, retrofit, retrofits, save
from hf_kvcache.lm_eval import ArgumentError, KVCacheLM
from hf_kvcache.models import embedded_heads, embedded_model

PAIR = PROSE[:500], " the rain"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"chache": "dense"}, r"no argument 'chache': is cache meant\?"),
        ({"window": 32}, r'no argument \'window\': there are cache, .*JSON.*"quant:bits=4,window=32"'),
        ({"use_cache": False}, "no argument 'use_cache'"),
        ({"cache": "quant:bitz=4"}, "cache: quant has no argument 'bitz'"),
        ({"cache": "none such"}, "cache: no cache is called"),
        ({"cache": None}, "needs a model and a cache"),
        ({"pretrained": None}, "needs a model and a cache"),
        ({"attn": "flash_attention_2"}, "attn=flash_attention_2 is none of hf_kvcache"),
        ({"batch_size": "auto"}, "batch_size=auto is measured without a cache; give a number"),
        ({"batch_size": "auto:4"}, "batch_size=auto is measured"),
        ({"logits_cache": False}, "logits_cache=False: a context is always read once"),
        ({"backend": "seq2seq"}, "backend=seq2seq: caches of this package are for causal"),
        ({"adapter": "no such folder"}, "adapter: .*no such folder"),
    ],
)
def test_what_it_refuses(given, said):
    with pytest.raises(ArgumentError, match=said):
        behind(**{"cache": "dense"} | given)


def test_a_known_model_that_is_not_here_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_kvcache.models.known.folder", lambda: tmp_path)
    with pytest.raises(ArgumentError, match="hf-kvcache models get smollm2"):
        behind("dense", pretrained="smollm2")


def test_a_model_of_ones_own():
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype="float32", attn_implementation="sdpa")
    lm = KVCacheLM(model, tokenizer=AutoTokenizer.from_pretrained(embedded_model()), cache="quant:bits=4")
    assert model.config._attn_implementation == "hf_kvcache"
    assert likelihoods(lm, PAIR) == likelihoods(behind("quant:bits=4"), PAIR)


def test_a_device_need_not_be_given():
    lm = KVCacheLM(LOADED["pretrained"], cache="dense", dtype="float32")
    assert lm.model.device.type == default_device().type


@pytest.mark.parametrize(
    ("cache", "attn", "expected"), [("dense", "eager", "eager"), ("dynamic", "hf_kvcache", "sdpa")]
)
def test_attention(cache, attn, expected):
    assert behind(cache, attn=attn).model.config._attn_implementation == expected


def test_an_adapter_is_attached():
    lm = behind("locret:budget=120,n_recent=32", adapter=str(embedded_heads()))
    pair = PROSE[:900], " the rain"
    assert likelihoods(lm, pair) != likelihoods(behind("dense"), pair)


def test_a_retrofitted_model_compresses_for_its_own_cache_only(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype="float32")
    retrofit(model, Settings("dms", window=16))
    save(model, tmp_path, AutoTokenizer.from_pretrained(embedded_model()))
    del model
    for cache, compresses in (("dms", True), ("dense", False)):
        lm = behind(cache, pretrained=str(tmp_path))
        assert {child.compresses for child in retrofits(lm.model).values()} == {compresses}
        assert likelihoods(lm, PAIR)[0][0] < 0


def test_half_precision_of_the_softmax_is_the_harness_own():
    exact, found = (likelihoods(behind("dense", softmax_dtype=dtype), PAIR)[0][0] for dtype in (None, "float64"))
    assert found == pytest.approx(exact, abs=1e-5)


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_mistake_is_no_traceback(monkeypatch, capsys):
    def refused():
        behind("dense", adaptor="heads")

    monkeypatch.setattr("hf_kvcache.lm_eval.main", refused)
    before = sys.argv
    assert main(["lm-eval", "--model", "hf-kvcache"]) == 2
    assert "hf-kvcache lm-eval: hf-kvcache has no argument 'adaptor': is adapter meant?" in capsys.readouterr().err
    assert sys.argv is before and LOADED["device"] == "cpu"


def test_without_the_harness_the_extra_is_named(monkeypatch, capsys):
    load = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "lm_eval":
            raise ImportError(f"No module named {name!r}")
        return load(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("hf_kvcache.lm_eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["lm-eval", "--model", "hf-kvcache"]) == 2
    assert "pip install 'hf_kvcache[lm-eval]'" in capsys.readouterr().err


def test_a_module_that_is_imported_anew_finds_its_name_taken(monkeypatch):
    """By itself, once more: what the harness knows stays."""
    # put back at the end
    monkeypatch.setattr(hf_kvcache, "lm_eval", hf_kvcache.lm_eval)
    for name in [name for name in sys.modules if name.startswith("hf_kvcache.lm_eval")]:
        monkeypatch.delitem(sys.modules, name)
    again = importlib.import_module("hf_kvcache.lm_eval")
    assert again.KVCacheLM is not KVCacheLM and get_model(again.NAME) is KVCacheLM
