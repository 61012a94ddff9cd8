"""`attn_implementation="hf_kvcache"` as transformers knows it before our attention has been imported.

transformers may be imported by one of our own modules, so making the name known imports none of them.
"""

from __future__ import annotations

import sys

# modeling files that pick the class of an attention module by the name of the implementation, and their tables
CLASS_TABLES = {
    "transformers.models.deepseek_ocr2.modeling_deepseek_ocr2": "DEEPSEEK_OCR2_SAM_VISION_ATTENTION_CLASSES",
    "transformers.models.falcon.modeling_falcon": "FALCON_ATTENTION_CLASSES",
    "transformers.models.git.modeling_git": "GIT_SELF_ATTENTION_CLASSES",
    "transformers.models.gpt_neo.modeling_gpt_neo": "GPT_NEO_ATTENTION_CLASSES",
    "transformers.models.gptj.modeling_gptj": "GPTJ_ATTENTION_CLASSES",
    "transformers.models.unlimited_ocr.modeling_unlimited_ocr": "UNLIMITED_OCR_SAM_VISION_ATTENTION_CLASSES",
}


def register() -> None:
    """Make the name known; `interface` puts its own functions there when it is imported."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("hf_kvcache", attention)
    AttentionMaskInterface.register("hf_kvcache", mask)


def register_class(module: str) -> None:
    """Let an imported modeling file of `CLASS_TABLES` use its eager class, which finds tensors, under our name."""
    classes = getattr(sys.modules[module], CLASS_TABLES[module], None)
    if classes is not None:
        classes.setdefault("hf_kvcache", classes["eager"])


def attention(*args, **kwargs):
    from hf_kvcache.attention.interface import kv_attention

    return kv_attention(*args, **kwargs)


def mask(*args, **kwargs):
    from hf_kvcache.attention.interface import kv_mask

    return kv_mask(*args, **kwargs)


def register_pass_throughs() -> None:
    """Let every attention function that is registered by now meet the rows of our caches."""
    from hf_kvcache.attention import interface

    interface.register_pass_throughs()
