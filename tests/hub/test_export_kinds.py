"""What the code of a repository does without depends on its cache: kinds that ask for what others never do."""

import pytest
import torch
from cases import ARCHITECTURES, BY_ID, new_model, padded, stock_implementation
from test_export import LIMIT, attention_functions, retrofitted  # noqa: F401
from transformers import AutoModelForCausalLM

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument, given_cache
from hf_kvcache.hub.export import export
from hf_kvcache.kernels import use_backend

KINDS = {
    "queries of the newest tokens": ("llama", BY_ID["sparse0.5-think-window8"].make),
    "the model's RoPE, by the policy": ("llama", BY_ID["expected-budget24"].make),
    "the model's RoPE, to close gaps": ("llama", BY_ID["streaming-compact"].make),
    "places among the layers, pages": ("llama", BY_ID["duo"].make),
    "a side of which only some channels stay": ("llama", BY_ID["sparsek-densev-window8"].make),
    "codecs in a chain": ("qwen3", BY_ID["keydiff-sparse-quant8"].make),
    "layers with a window, softcaps": ("gemma2", BY_ID["quant8k4v-window8"].make),
    "a channel of queries": ("qwen2", kv.DMSCache, retrofitted("dms", decision="borrowed")),
    "a channel of keys and queries": ("qwen3", kv.DMCCache, retrofitted("dmc", decision="borrowed", window=0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_repository_has_what_its_cache_asks_for(kind, tmp_path):
    arch, make, *prepare = KINDS[kind]
    attention = stock_implementation(arch)
    ours = new_model(ARCHITECTURES[arch](), attention)
    for change in prepare:
        ours = change(ours)
    export(ours, make(), tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.py")) < LIMIT
    how = dict(trust_remote_code=True, dtype=torch.float32, attn_implementation=attention)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, **how).eval()
    ids, mask, _ = padded([60, 41])
    options = dict(attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=None)
    options |= dict(return_dict_in_generate=True, output_logits=True)
    found = theirs.generate(ids, **options)
    with use_backend("reference"):
        expected = ours.generate(ids, **cache_argument(make()), **options)
    assert not isinstance(given_cache(found), kv.KVCache)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert torch.allclose(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-5)
    assert given_cache(found).nbytes == given_cache(expected).nbytes
