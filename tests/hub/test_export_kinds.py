"""What the code of a repository does without depends on its cache: kinds that ask for what others never do."""

import pytest
import torch
from cases import ARCHITECTURES, BY_ID, SIZES, new_model, padded, stock_implementation
from test_export import LIMITS, attention_functions, retrofitted  # noqa: F401
from transformers import AutoModelForCausalLM, BloomConfig, DeepseekV3Config, FalconH1Config

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument, given_cache
from hf_kvcache.hub.export import export
from hf_kvcache.hub.spec import cache_of, spec_of
from hf_kvcache.kernels import use_backend

LATENTS = dict(kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16)
EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1)
STATES = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_d_ssm=128, mamba_chunk_size=16)
CONFIGS = ARCHITECTURES | {
    "bloom": lambda: BloomConfig(vocab_size=SIZES["vocab_size"], hidden_size=64, n_layer=2, n_head=4),
    "deepseek": lambda: DeepseekV3Config(**SIZES | LATENTS | EXPERTS | dict(num_key_value_heads=4)),
    "falcon_h1": lambda: FalconH1Config(**SIZES | STATES),
}
KINDS = {
    "queries of the newest tokens": ("llama", BY_ID["sparse0.5-think-window8"].make),
    "the model's RoPE, by the policy": ("llama", BY_ID["expected-budget24"].make),
    "the model's RoPE, to close gaps": ("llama", BY_ID["streaming-rerotated"].make),
    "places among the layers, pages": ("llama", BY_ID["duo"].make),
    "another policy's scores, heads of different lengths": ("llama", BY_ID["adakv-budget42"].make),
    "a side of which only some channels stay": ("llama", BY_ID["sparsek-densev-window8"].make),
    "codecs in a chain": ("qwen3", BY_ID["keydiff-sparse-quant8"].make),
    "layers with a window, softcaps": ("gemma2", BY_ID["quant8k4v-window8"].make),
    "an attention of the model's own": ("bloom", BY_ID["quant8k4v-window8"].make),
    # transformers keeps those of a layer in one tensor, and one by one in files
    "latents that the model expands, experts": ("deepseek", BY_ID["quant8k4v-window8"].make),
    "states beside rows, a buffer that the model fills in": ("falcon_h1", BY_ID["quant8k4v-window8"].make),
    "a channel of queries": ("qwen2", kv.DMSCache, retrofitted("dms", decision="borrowed")),
    "a channel of keys and queries": ("qwen3", kv.DMCCache, retrofitted("dmc", decision="borrowed", window=0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_repository_has_what_its_cache_asks_for(kind, tmp_path):
    arch, make, *prepare = KINDS[kind]
    attention = "eager" if arch == "bloom" else stock_implementation(arch)
    ours = new_model(CONFIGS[arch](), attention)
    for change in prepare:
        ours = change(ours)
    export(ours, make(), tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.py")) < 1000 * max(LIMITS.values())
    how = dict(trust_remote_code=True, dtype=torch.float32, attn_implementation=attention)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, **how).eval()
    ids, mask, _ = padded([60, 41])
    options = dict(attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=None)
    options |= dict(return_dict_in_generate=True, output_logits=True)
    found = theirs.generate(ids, **options)
    with use_backend("reference"):
        cache = cache_of(spec_of(make()), config=ours.config)
        expected = ours.generate(ids, **cache_argument(cache), **options)
    assert not isinstance(given_cache(found), kv.KVCache)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert torch.allclose(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-5)
    assert given_cache(found).nbytes == given_cache(expected).nbytes
