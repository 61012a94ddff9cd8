"""A repository of what a file describes, as `hf-kvcache tune` writes one."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvcache as kv
from hf_kvcache import compat
from hf_kvcache.cache_config import KVCacheConfig
from hf_kvcache.cli import main
from hf_kvcache.kernels import use_backend
from hf_kvcache.models import embedded_model


def test_a_configuration_is_exported(tmp_path):
    """What `hf-kvcache tune` writes, options of single layers included, is what the repository runs."""

    def made():
        return kv.KVCache(codec=kv.Quantize(4), window=32, per_layer={1: {"codec": kv.Quantize(8)}, 2: {"window": 64}})

    KVCacheConfig.from_cache(made()).save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    inputs = tokenizer("The rain fell on the harbour and the boats lay still. " * 20, return_tensors="pt")
    stock = AutoModelForCausalLM.from_pretrained(
        embedded_model(), dtype=torch.float32, attn_implementation="hf_kvcache"
    ).eval()
    options = "--no-measure", "--out", str(tmp_path / "out")
    assert main(["export", "--config", str(tmp_path / "kv_cache_config.json"), *options]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32).eval()
    found = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    with use_backend("reference"):
        theirs = model.generate(**inputs, **found)
        ours = stock.generate(**inputs, **found, **compat.cache_argument(made()))
    assert theirs.sequences.tolist() == ours.sequences.tolist()
    assert compat.given_cache(theirs).nbytes == compat.given_cache(ours).nbytes
    assert main(["export", "--config", str(tmp_path / "no.json"), *options]) == 2
