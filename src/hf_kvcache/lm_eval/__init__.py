"""`hf-kvcache`, a model of the lm-evaluation-harness that answers through a compressed cache.

Importing this makes the name known to the harness, which looks for models in no other package by itself:

    hf-kvcache lm-eval --model hf-kvcache --model_args pretrained=...,cache=quant:bits=4 --tasks ...

    import hf_kvcache.lm_eval
    lm_eval.simple_evaluate(model="hf-kvcache", model_args={"pretrained": ..., "cache": "quant:bits=4"}, ...)
"""

from __future__ import annotations

try:
    from lm_eval.api.registry import model_registry, register_model
except ImportError as error:
    raise ImportError(
        "the lm-evaluation-harness is not installed: pip install 'hf_kvcache[lm-eval]' brings it"
    ) from error

from hf_kvcache.lm_eval.model import ArgumentError, KVCacheLM

NAME = "hf-kvcache"

# the harness refuses a name that it knows; a module that is imported anew has been there before
if NAME not in model_registry or model_registry.get(NAME).__module__ != KVCacheLM.__module__:
    register_model(NAME)(KVCacheLM)

__all__ = ["NAME", "ArgumentError", "KVCacheLM", "main"]


def main() -> None:
    """The harness' own command line, from `sys.argv`, with our model."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
