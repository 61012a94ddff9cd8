"""Tiny vision-language models, each with a prompt that begins with an image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AutoConfig
from zoo import SIZES, prompt

TEXT = {
    name: SIZES[name]
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
} | dict(vocab_size=120)
# ids beyond those of random text
IMAGE, START, END, VIDEO = 110, 111, 112, 113
MROPE = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4}
QWEN = dict(image_token_id=IMAGE, vision_start_token_id=START, vision_end_token_id=END, video_token_id=VIDEO)
VISION = dict(hidden_size=32, intermediate_size=64, num_heads=2, patch_size=14)


def llava():
    """CLIP's image features in front of Llama's text."""
    vision = dict(
        model_type="clip_vision_model",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    text = TEXT | dict(model_type="llama")
    return dict(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=16, vision_feature_layer=-1
    )


def qwen2_vl():
    return dict(
        text_config=TEXT | dict(rope_parameters=MROPE),
        vision_config=dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2, patch_size=14, mlp_ratio=2),
        **QWEN,
    )


def qwen2_5_vl():
    vision = VISION | dict(depth=2, out_hidden_size=64, fullatt_block_indexes=[1], window_size=56)
    return dict(text_config=TEXT | dict(rope_parameters=MROPE), vision_config=vision, **QWEN)


def qwen3_vl():
    vision = VISION | dict(depth=2, out_hidden_size=64, deepstack_visual_indexes=[0], num_position_embeddings=64)
    text = TEXT | dict(head_dim=16, rope_parameters=MROPE)
    return dict(text_config=text, vision_config=vision, **QWEN)


def gemma3():
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    text = TEXT | dict(
        head_dim=16,
        sliding_window=24,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    return dict(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


CONFIGS: dict[str, Callable[[], dict]] = {
    make.__name__: make for make in (llava, qwen2_vl, qwen2_5_vl, qwen3_vl, gemma3)
}


def config_of(family: str):
    """The config of a tiny model of this type."""
    return AutoConfig.for_model(family, **CONFIGS[family]())


def inputs_of(family: str, batch: int = 2) -> dict:
    """Image and text, 120 tokens a row, of which 16 are image features (of 64 patches where the model merges four)."""
    ids = prompt(batch)
    is_merged = family.startswith("qwen")
    ids[:, 1], ids[:, 2:18], ids[:, 18] = START, IMAGE, END
    generator = torch.Generator().manual_seed(2)
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if is_merged:
        width = 3 * 2 * 14**2
        inputs |= dict(
            pixel_values=torch.randn(batch * 64, width, generator=generator),
            image_grid_thw=torch.tensor([[1, 8, 8]] * batch),
            mm_token_type_ids=(ids == IMAGE).int(),
        )
    else:
        inputs |= dict(pixel_values=torch.randn(batch, 3, 56, 56, generator=generator))
    if family == "gemma3":
        inputs |= dict(token_type_ids=(ids == IMAGE).long())
    return inputs
