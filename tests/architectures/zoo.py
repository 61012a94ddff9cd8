"""A tiny random model of every causal architecture that transformers has."""

from __future__ import annotations

import dataclasses
from functools import cache

import torch
from families import FAMILIES
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

VOCAB = 100

# a config gets those of these that it has a field for
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=320,
    sliding_window=24,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    # one that is only read as part of an encoder and a decoder
    is_decoder=True,
    d_model=64,
    decoder_layers=2,
    decoder_attention_heads=4,
    decoder_ffn_dim=64,
    encoder_layers=2,
    encoder_attention_heads=4,
    encoder_ffn_dim=64,
    # GPT-2 and its time
    n_positions=320,
    n_embd=64,
    n_layer=2,
    n_head=4,
    n_inner=64,
    rotary_dim=8,
    # experts
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    shared_intermediate_size=32,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    moe_k=2,
    moe_topk=2,
    n_shared_experts=1,
    num_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    # multi-head latent attention
    kv_lora_rank=32,
    q_lora_rank=32,
    qk_rope_head_dim=16,
    qk_nope_head_dim=16,
    v_head_dim=16,
    index_topk=32,
    index_head_dim=16,
    index_n_heads=2,
    # linear attention
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_head_dim=16,
    linear_num_heads=4,
    mamba_n_heads=8,
    mamba_d_head=16,
    mamba_d_state=16,
    mamba_d_ssm=128,
    mamba_chunk_size=16,
    mamba_num_heads=8,
    mamba_head_dim=16,
    ssm_state_size=16,
    n_mamba_heads=2,
    chunk_size=16,
)


def config_of(family: str):
    """The config of a tiny model of this type."""
    return _sized(CONFIG_MAPPING[family], FAMILIES[family])


def _sized(kind: type, given: dict):
    """A config with the sizes above and what is given, in its parts too, where they are named."""
    if kind is AutoConfig:
        kind = CONFIG_MAPPING[given["model_type"]]
    fields = {field.name for field in dataclasses.fields(kind)}
    # a field with two names takes its value under one of them
    aliases = {theirs for ours, theirs in kind.attribute_map.items() if ours in fields and theirs in fields}
    parts = {name: _sized(part, given[name]) for name, part in kind.sub_configs.items() if name in given}
    return kind(**{name: size for name, size in SIZES.items() if name in fields - aliases} | given | parts)


@cache
def tiny_model(family: str):
    """A random model in float32 whose attention matters: with the usual initialisation every score is close to zero."""
    torch.manual_seed(0)
    return sharpened(AutoModelForCausalLM.from_config(config_of(family)))


def sharpened(model):
    """The model with larger weights, none of them zero, ready to generate."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2 or "lm_head" in name:
                continue
            if weight.any():
                weight.mul_(5)
            else:
                weight.normal_(0, 0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.use_cache = True
    return model.eval().requires_grad_(False)


def prompt(batch: int = 2, length: int = 120, seed: int = 1) -> torch.Tensor:
    """Random token ids `[batch, length]`."""
    return torch.randint(3, VOCAB - 3, (batch, length), generator=torch.Generator().manual_seed(seed))
