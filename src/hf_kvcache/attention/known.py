"""`attn_implementation="hf_kvcache"` as transformers knows it before our attention has been imported.

transformers may be imported by one of our own modules, so making the name known imports none of them.
"""

from __future__ import annotations


def register() -> None:
    """Make the name known; `interface` puts its own functions there when it is imported."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("hf_kvcache", attention)
    AttentionMaskInterface.register("hf_kvcache", mask)


def attention(*args, **kwargs):
    from hf_kvcache.attention.interface import kv_attention

    return kv_attention(*args, **kwargs)


def mask(*args, **kwargs):
    from hf_kvcache.attention.interface import kv_mask

    return kv_mask(*args, **kwargs)
