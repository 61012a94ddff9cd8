"""KV-cache compression for Hugging Face transformers.

`import hf_kvcache` makes `attn_implementation="hf_kvcache"` known to transformers and our kinds of adapters to PEFT, as
soon as these are imported themselves; it changes nothing else, and imports neither.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from hf_kvcache.attention import known
from hf_kvcache.lazy import lazily
from hf_kvcache.on_import import when_imported
from hf_kvcache.registry import METHODS

if TYPE_CHECKING:
    from hf_kvcache.adapters.attaching import attach
    from hf_kvcache.adapters.bases import Bases
    from hf_kvcache.cache import KVCache
    from hf_kvcache.codecs import Chain, Codec, Dense, LowRank, Quantize, Sparse
    from hf_kvcache.identity import CacheFileError
    from hf_kvcache.kernels import BackendUnavailable, use_backend
    from hf_kvcache.layer import KVLayer
    from hf_kvcache.long_prompts import prefill, query_first
    from hf_kvcache.models import embedded_heads, embedded_model
    from hf_kvcache.policies import *  # noqa: F403
    from hf_kvcache.policies import Merge, Policy
    from hf_kvcache.presets import (
        DenseCache,
        DMCCache,
        DMSCache,
        EvictionCache,
        LocretCache,
        LowRankCache,
        QuantCache,
        SparseCache,
    )
    from hf_kvcache.view import KVView

__version__ = "0.1.0"

# the registry names every policy but what they are made of and what goes around them
_POLICIES = [m.factory.split(":")[1] for m in METHODS if ".policies" in m.factory]

__all__ = [
    "BackendUnavailable",
    "Bases",
    "CacheFileError",
    "Chain",
    "Codec",
    "DMCCache",
    "DMSCache",
    "Dense",
    "DenseCache",
    "EvictionCache",
    "KVCache",
    "KVLayer",
    "KVView",
    "LocretCache",
    "LowRank",
    "LowRankCache",
    "Merge",
    "Policy",
    "QuantCache",
    "Quantize",
    "Sparse",
    "SparseCache",
    "attach",
    "embedded_heads",
    "embedded_model",
    "prefill",
    "query_first",
    "use_backend",
]
__all__ += _POLICIES

# what is imported when it is first asked for: the names of `__all__`, and packages that `import hf_kvcache` gives
_HOME = {
    "BackendUnavailable": "kernels",
    "Bases": "adapters.bases",
    "CacheFileError": "identity",
    "Chain": "codecs",
    "Codec": "codecs",
    "DMCCache": "presets",
    "DMSCache": "presets",
    "Dense": "codecs",
    "DenseCache": "presets",
    "EvictionCache": "presets",
    "KVCache": "cache",
    "KVLayer": "layer",
    "KVView": "view",
    "LocretCache": "presets",
    "LowRank": "codecs",
    "LowRankCache": "presets",
    "Merge": "policies",
    "Policy": "policies",
    "QuantCache": "presets",
    "Quantize": "codecs",
    "Sparse": "codecs",
    "SparseCache": "presets",
    "adapters": "adapters",
    "attach": "adapters.attaching",
    "codecs": "codecs",
    "dmc": "dmc",
    "embedded_heads": "models",
    "embedded_model": "models",
    "kernels": "kernels",
    "models": "models",
    "policies": "policies",
    "prefill": "long_prompts",
    "query_first": "long_prompts",
    "stores": "stores",
    "use_backend": "kernels",
} | dict.fromkeys(_POLICIES, "policies")

__getattr__ = lazily(__name__, _HOME | {"HeadSplit": "policies"}, globals())


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _make_adapters_known() -> None:
    from hf_kvcache import adapters

    adapters.register()


when_imported("transformers", known.register)
when_imported("peft", _make_adapters_known)
for _module in known.CLASS_TABLES:
    when_imported(_module, partial(known.register_class, _module))
