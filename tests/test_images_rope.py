"""RoPE with several axes: right for text, refused before the first token where there are images."""

import pytest
import torch
from cases import KNOBS, assert_close
from transformers import AutoModelForImageTextToText, DynamicCache, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

import hf_kvcache as kv
from hf_kvcache.compat import cache_argument

TEXT = dict(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=200,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
)
TOKENS = dict(image_token_id=151, vision_start_token_id=152, vision_end_token_id=153, video_token_id=154)
VISION = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, patch_size=14)
CONFIGS = {
    "qwen2-vl": lambda: Qwen2VLConfig(
        text_config=TEXT,
        vision_config=dict(depth=2, embed_dim=32, hidden_size=64, mlp_ratio=2, num_heads=2, patch_size=14),
        **TOKENS,
    ),
    "qwen2.5-vl": lambda: Qwen2_5_VLConfig(
        text_config=TEXT, vision_config=VISION | dict(fullatt_block_indexes=[1], window_size=56), **TOKENS
    ),
    "qwen3-vl": lambda: Qwen3VLConfig(
        text_config=TEXT,
        vision_config=VISION | dict(deepstack_visual_indexes=[0], num_position_embeddings=16),
        **TOKENS,
    ),
}
# what rotates keys or queries, and needs to know where they are
NEEDY = {
    "rerotated": lambda: kv.EvictionCache("streaming", budget=24, rerotate_keys=True, **KNOBS),
    "rerotated-ragged": lambda: kv.EvictionCache("adakv", budget=44, rerotate_keys=True, window=2, **KNOBS),
    "expected": lambda: kv.EvictionCache("expected_attention", budget=24, **KNOBS),
    "expected-ragged": lambda: kv.EvictionCache("adakv", scorer="expected_attention", budget=44, window=2, **KNOBS),
    "lowrank-pre": lambda: kv.LowRankCache(1.0, window=8),
}
# what leaves them where they are
OTHERS = {
    "dense": kv.KVCache,
    "lowrank-post": lambda: kv.LowRankCache(1.0, rope="post", window=8),
    "keydiff": lambda: kv.EvictionCache("keydiff", budget=256),
}


def model_of(name):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIGS[name](), attn_implementation="hf_kvcache").eval()
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False)


def text(length=50):
    ids = torch.randint(3, 150, (1, length), generator=torch.Generator().manual_seed(0))
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))


def with_image(length=50):
    """A text with an image of 2 x 2 tokens near its beginning."""
    inputs = text(length)
    ids = inputs["input_ids"]
    ids[0, 1:7] = torch.tensor([152, 151, 151, 151, 151, 153])
    pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    kinds = (ids == 151).int()
    return inputs | dict(pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 4]]), mm_token_type_ids=kinds)


def generate(model, cache, inputs):
    options = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return model.generate(**inputs, **cache_argument(cache), **options)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cache", NEEDY)
def test_images_are_refused_in_the_first_call(name, cache):
    model = model_of(name)
    with pytest.raises(ValueError, match="positions of an image or a video do not count tokens"):
        generate(model, NEEDY[cache](), with_image())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cache", NEEDY)
def test_images_in_a_later_turn_are_refused(name, cache):
    model, held = model_of(name), NEEDY[cache]()
    positions = torch.arange(50, 70).expand(3, 1, -1).clone()
    # one point in time, two rows, two columns; the text goes on behind the largest
    positions[:, 0, 2:6] = 52 + torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]])
    positions[..., 6:] -= 2
    with torch.no_grad():
        model(**text(), **cache_argument(held))
        with pytest.raises(ValueError, match="positions of an image or a video do not count tokens"):
            model(with_image(20)["input_ids"] % 150 + 3, position_ids=positions, **cache_argument(held))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cache", OTHERS)
def test_images_are_welcome_where_nothing_is_rotated(name, cache):
    model = model_of(name)
    ours, reference = (generate(model, c, with_image()) for c in (OTHERS[cache](), DynamicCache()))
    assert torch.equal(ours.sequences, reference.sequences)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cache", NEEDY)
def test_text_is_welcome(name, cache):
    generate(model_of(name), NEEDY[cache](), text())


@pytest.mark.parametrize("name", CONFIGS)
def test_text_is_rotated_as_the_model_does(name):
    model = model_of(name)
    ours, reference = (generate(model, c, text()) for c in (NEEDY["lowrank-pre"](), DynamicCache()))
    assert_close("logits", torch.stack(ours.logits), torch.stack(reference.logits), 1e-3)
    cache, dense, positions = NEEDY["rerotated"](), DynamicCache(), torch.arange(50)
    with torch.no_grad():
        model(**text(), **cache_argument(cache))
        model(**text(), position_ids=(positions + 26).expand(3, 1, -1), **cache_argument(dense))
    for layer, moved in zip(cache.layers, dense.layers, strict=True):
        assert_close("keys", layer.store.dense["k"][:, :, :2], moved.keys[:, :, :2], 1e-4)


def test_left_padding_is_no_image():
    model, inputs = model_of("qwen2.5-vl"), text()
    inputs["attention_mask"][0, :7] = 0
    for name in ("rerotated", "expected"):
        generate(model, NEEDY[name](), inputs)
    cache = NEEDY["lowrank-pre"]()
    generate(model, cache, inputs)
    # 50 tokens of the prompt and 7 generated ones, without 7 pads
    assert cache.layers[0].store.dense["position_ids"][0, 0, -1] == 49


def test_what_cannot_be_seen_is_refused(monkeypatch):
    from hf_kvcache import rope_of_call

    monkeypatch.setattr(rope_of_call, "embeddings_given", lambda module: rope_of_call.UNSEEN)
    with pytest.raises(ValueError, match="cannot be seen"):
        generate(model_of("qwen2.5-vl"), NEEDY["rerotated"](), text())
