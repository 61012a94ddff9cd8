"""The table of architectures: what each needs beside the shared sizes, and why others are left out."""

from __future__ import annotations

HYBRID = dict(layer_types=["linear_attention", "full_attention"])
SLIDING = dict(layer_types=["sliding_attention", "full_attention"])
MLA = dict(num_key_value_heads=4)
WINDOWLESS = dict(sliding_window=None)
INKLING = dict(
    layer_types=["hybrid_sliding", "hybrid"],
    sliding_window_size=24,
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
    swa_head_dim=16,
    unpadded_vocab_size=100,
    rel_extent=32,
)

# model types whose config needs nothing beside `zoo.SIZES`
PLAIN = """
apertus apertus1p5_text arcee aria_text bart beam bert bert-generation biogpt bitnet blenderbot blenderbot-small bloom
camembert codegen cohere data2vec-text diffllama dots1 electra ernie ernie4_5 ernie4_5_moe exaone falcon
falcon_h1 flex_olmo gemma glm glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gptj granite granitemoe
granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2
llama mbart megatron-bert minimax_m2 mvp nanochat nemotron olmo olmo2 olmoe
opt persimmon phi plbart qwen3_moe rembert roberta roberta-prelayernorm roformer sarvam_moe seed_oss
solar_open stablelm trocr whisper xlm-roberta xlm-roberta-xl
""".split()

FAMILIES = {name: {} for name in PLAIN} | {
    "afmoe": SLIDING,
    "axk1": MLA,
    "axk2": MLA,
    "bailing_hybrid": HYBRID | MLA,
    "bamba": dict(attn_layer_indices=[1]),
    "big_bird": dict(attention_type="original_full"),
    "bigbird_pegasus": dict(attention_type="original_full"),
    "cohere2": SLIDING,
    "cohere2_moe": SLIDING | dict(mlp_layer_types=["dense", "sparse"]),
    "cohere_compass_text": SLIDING
    | dict(
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
            for kind in ("sliding_attention", "full_attention")
        }
    ),
    "cpmant": dict(dim_head=16, dim_ff=64, prompt_types=4, prompt_length=8, segment_types=4),
    "ctrl": dict(dff=64),
    "cwm": SLIDING,
    "dbrx": dict(
        n_heads=4,
        n_layers=2,
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        ffn_config=dict(hidden_size=64, ffn_hidden_size=64),
    ),
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "deepseek_v4": dict(
        o_groups=2,
        o_lora_rank=16,
        layer_types=["compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
    ),
    "doge": WINDOWLESS,
    "dory": SLIDING | dict(n_input_layers=0, n_output_layers=0),
    "dots3_note_text": MLA,
    "emu3": dict(
        text_config={}, vq_config=dict(embed_dim=16, base_channels=16, channel_multiplier=[1], num_res_blocks=1)
    ),
    "exaone4": SLIDING,
    "exaone_moe": SLIDING,
    "flint": SLIDING,
    "fuyu": dict(text_config=dict(model_type="persimmon")),
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "gemma3n_text": dict(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=100,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
    ),
    "gemma4_text": SLIDING | dict(global_head_dim=16, vocab_size_per_layer_input=100, hidden_size_per_layer_input=16),
    "gemma4_unified_text": SLIDING | dict(global_head_dim=16),
    "git": dict(num_hidden_layers=2, vision_config=dict(image_size=28, patch_size=14)),
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA,
    "gpt_neo": dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=24),
    "gpt_oss": SLIDING,
    "granite_swa": SLIDING,
    "granitemoe_swa": SLIDING,
    "granitemoehybrid": HYBRID,
    "hrm_text": {},
    "hy_v4": MLA,
    "inkling2_loop_text": INKLING
    | dict(
        num_hidden_layers=3,
        layer_types=["hybrid_sliding", "hybrid", "hybrid"],
        n_layers_per_attn_res_block=1,
        loop_layer_index_start=1,
        loop_layer_index_end=2,
        loop_num_passes=2,
        loop_gate_rank=8,
    ),
    "inkling2_text": INKLING,
    "inkling_text": INKLING,
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "jetmoe": dict(kv_channels=16),
    "kimi_linear": HYBRID | MLA,
    "kolibri1": SLIDING,
    "laguna": SLIDING,
    "lara_mini": HYBRID,
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "lfm3": dict(layer_types=["conv", "full_attention"]),
    "llama4_text": dict(layer_types=["chunked_attention", "full_attention"]),
    "longcat_flash": MLA | dict(num_layers=1, ffn_hidden_size=64, expert_ffn_hidden_size=32, zero_expert_num=2),
    "marian": dict(scale_embedding=True),
    "mellum": SLIDING,
    "mimo_v2_flash": SLIDING | dict(head_dim=24),
    "minicpm3": MLA,
    "minimax": HYBRID,
    "minimax_m3_vl_text": {},
    "ministral": SLIDING,
    "ministral3": WINDOWLESS,
    "mistral": WINDOWLESS,
    "mixtral": WINDOWLESS,
    "mllama": dict(text_config=dict(cross_attention_layers=[])),
    "modernbert-decoder": SLIDING,
    "moshi": dict(
        sliding_window=3000,
        ffn_dim=64,
        depth_decoder_config=dict(input_size=64, ffn_dim=64, audio_vocab_size=32),
        audio_encoder_config=dict(model_type="mimi", num_filters=4, codebook_size=32, codebook_dim=8, hidden_size=32),
    ),
    "mpt": dict(n_heads=4, n_layers=2, max_seq_len=320),
    "nemotron_h": dict(layers_block_type=["linear_attention", "full_attention"]),
    "olmo3": SLIDING,
    "olmo_hybrid": HYBRID,
    "pegasus": dict(scale_embedding=True),
    "phi3": WINDOWLESS,
    "phi4_multimodal": WINDOWLESS
    | dict(
        vision_config=dict(image_size=28, crop_size=28),
        audio_config=dict(ext_pw_out_channel=64, ext_pw_kernel_size=1, nemo_conv_channels=32, num_blocks=1),
    ),
    "phimoe": WINDOWLESS,
    "prophetnet": dict(
        num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4, num_decoder_attention_heads=4
    ),
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp_text": dict(
        layer_types=["linear_attention", "indexed_attention"],
        hc_lowrank=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=32,
        indexer_compress_ratio=4,
    ),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "roc_bert": dict(
        pronunciation_embed_dim=16, pronunciation_vocab_size=100, shape_embed_dim=16, shape_vocab_size=100
    ),
    "sarvam_mla": MLA,
    "smollm3": {},
    "starcoder2": WINDOWLESS,
    "vaultgemma": SLIDING,
    "xglm": dict(ffn_dim=64, num_layers=2, attention_heads=4),
    "xmod": dict(default_language="en_XX"),
    "youtu": MLA,
    "zamba": dict(num_hidden_layers=3, layers_block_type=["linear_attention", "hybrid", "hybrid"]),
    "zamba2": dict(layers_block_type=["linear_attention", "hybrid"]),
    "zaya": dict(num_experts_per_tok=1),
}

# models that look into `cache.layers` before any layer has been called, where every cache has to know the config
NEED_CONFIG = {"qwen4_exp_text"}

# what transformers itself has mended by the release of `expected.json`
BROKEN_BEFORE = {
    "doge": "without padding its own attention is not causal",
    "qwen4_exp_text": "its config refuses indexed layers",
    "recurrent_gemma": "it asks layers that only a cache made of its config has",
}

# model types of the mapping that are not in the table, and why
LEFT_OUT = {
    "blt": "reads bytes through three transformers of which each has a cache of its own",
    "dots3_note": "its text model is dots3_note_text",
    "falcon_mamba": "no keys and values (state space)",
    "gemma3": "in the table of models with pixels",
    "gemma3n": "needs the package timm; its text model is gemma3n_text",
    "gemma4": "its text model is gemma4_text",
    "gemma4_assistant": "drafts for Gemma 4 from that model's rows and has none of its own",
    "gemma4_unified": "its text model is gemma4_unified_text",
    "gemma4_unified_assistant": "drafts for Gemma 4 from that model's rows and has none of its own",
    "got_ocr2": "reads images only; its text model is qwen2",
    "llama4": "its text model is llama4_text",
    "mamba": "no keys and values (state space)",
    "mamba2": "no keys and values (state space)",
    "moss_transcribe_diarize": "reads audio; its text model is qwen3",
    "musicgen": "writes audio codebooks, not tokens",
    "musicgen_melody": "writes audio codebooks, not tokens",
    "openai-gpt": "has no cache",
    "qwen3_5": "its text model is qwen3_5_text",
    "qwen3_5_moe": "its text model is qwen3_5_moe_text",
    "qwen4_exp": "its text model is qwen4_exp_text",
    "reformer": "a cache of its own kind (hashed buckets)",
    "rwkv": "no keys and values (recurrent)",
    "xlm": "has no cache",
    "xlnet": "memories of its own kind (mems)",
    "xlstm": "no keys and values (recurrent)",
}
