"""Attention that is not causal, such as of vision towers, stays what it was, whichever implementation is in use."""

import subprocess
import sys
import textwrap

import pytest
import torch

PROGRAM = """
    import torch, transformers
    transformers.logging.set_verbosity_error()
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    vision = dict(**sizes, image_size=28, patch_size=14)

    def llava():
        text = dict(model_type="llama", **sizes | dict(num_attention_heads=4), num_key_value_heads=2, vocab_size=128)
        return LlavaForConditionalGeneration(LlavaConfig(
            vision_config=dict(model_type="clip_vision_model", **vision), text_config=text, image_token_index=100,
            vision_feature_layer=-1, image_seq_length=4))

    def run(make, implementation):
        torch.manual_seed(0)
        model = make().eval()
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.data.mul_(5)
        model.set_attn_implementation(implementation)
        generator = torch.Generator().manual_seed(1)
        inputs = dict(pixel_values=torch.randn(1, 3, 28, 28, generator=generator))
        if make is llava:
            inputs |= dict(input_ids=torch.tensor([[1] + [100] * 4 + [5, 6, 7]]))
        with torch.no_grad():
            out = model(**inputs)
        return out.logits if make is llava else out.last_hidden_state

    clip, siglip = CLIPVisionConfig(**vision), SiglipVisionConfig(**vision)
    towers = [lambda: CLIPVisionModel(clip), lambda: SiglipVisionModel(siglip), llava]
    before = [[run(make, name) for name in ("eager", "sdpa")] for make in towers]
    import hf_kvcache as kv
    kv.KVCache()
    for make, expected in zip(towers, before):
        for name, theirs in zip(("eager", "sdpa", "hf_kvcache"), [*expected, expected[0]]):
            worst = (run(make, name) - theirs).abs().max().item()
            assert worst < 1e-4, (name, worst)
"""


@pytest.mark.slow
def test_vision_towers_before_and_after_a_cache_was_made():
    """In a process of its own, where the first results come before anything of ours is known."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PROGRAM)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "hf_kvcache"])
def test_no_mask_is_no_mask(implementation):
    from cases import tiny_model

    from hf_kvcache.attention.interface import kv_attention, register_pass_throughs

    register_pass_throughs()
    from transformers import AttentionInterface

    function = kv_attention if implementation == "hf_kvcache" else AttentionInterface()[implementation]
    module = type("Tower", (type(tiny_model().model.layers[0].self_attn),), {"is_causal": False})
    tower = tiny_model().model.layers[0].self_attn
    was = type(tower)
    try:
        tower.__class__, tower.is_causal = module, False
        q, k = torch.randn(1, 4, 6, 16), torch.randn(2, 1, 2, 6, 16)
        out = function(tower, q, k[0], k[1], None, scaling=0.25)[0]
    finally:
        tower.__class__, tower.is_causal = was, True
    expected = torch.nn.functional.scaled_dot_product_attention(q, *k, scale=0.25, enable_gqa=True)
    assert torch.allclose(out, expected.transpose(1, 2), atol=1e-5)
