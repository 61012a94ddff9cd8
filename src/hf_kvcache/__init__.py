"""KV-cache compression for Hugging Face transformers.

`import hf_kvcache` makes `attn_implementation="hf_kvcache"` known to transformers and changes nothing else.
"""

from hf_kvcache.adapters.bases import Bases
from hf_kvcache.attention.interface import register as _register
from hf_kvcache.cache import KVCache
from hf_kvcache.codecs import Chain, Codec, Dense, LowRank, Quantize, Sparse
from hf_kvcache.kernels import BackendUnavailable, use_backend
from hf_kvcache.layer import KVLayer
from hf_kvcache.models import embedded_model
from hf_kvcache.persist import CacheFileError
from hf_kvcache.policies import KeyDiff, Policy, Streaming
from hf_kvcache.presets import DenseCache, EvictionCache, LowRankCache, QuantCache, SparseCache
from hf_kvcache.view import KVView

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "Bases",
    "CacheFileError",
    "Chain",
    "Codec",
    "Dense",
    "DenseCache",
    "EvictionCache",
    "KVCache",
    "KVLayer",
    "KVView",
    "KeyDiff",
    "LowRank",
    "LowRankCache",
    "Policy",
    "Quantize",
    "Sparse",
    "SparseCache",
    "QuantCache",
    "Streaming",
    "embedded_model",
    "use_backend",
]

_register()
