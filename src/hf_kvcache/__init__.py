"""KV-cache compression for Hugging Face transformers.

`import hf_kvcache` makes `attn_implementation="hf_kvcache"` known to transformers and, where PEFT is installed, our
kinds of adapters to PEFT; it changes nothing else.
"""

from hf_kvcache.adapters import register as _register_adapters
from hf_kvcache.adapters.attaching import attach
from hf_kvcache.adapters.bases import Bases
from hf_kvcache.attention.interface import register as _register
from hf_kvcache.cache import KVCache
from hf_kvcache.codecs import Chain, Codec, Dense, LowRank, Quantize, Sparse
from hf_kvcache.kernels import BackendUnavailable, use_backend
from hf_kvcache.layer import KVLayer
from hf_kvcache.models import embedded_heads, embedded_model
from hf_kvcache.persist import CacheFileError
from hf_kvcache.policies import (
    DMC,
    DMS,
    H2O,
    NACL,
    RKV,
    TOVA,
    AdaKV,
    ExpectedAttention,
    FastGen,
    HeadSplit,
    KeyDiff,
    L2Norm,
    LagKV,
    Locret,
    Merge,
    Policy,
    PyramidKV,
    Random,
    SnapKV,
    Streaming,
    Threshold,
)
from hf_kvcache.prefill import prefill, query_first
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

__all__ = [
    "AdaKV",
    "BackendUnavailable",
    "Bases",
    "CacheFileError",
    "Chain",
    "Codec",
    "DMC",
    "DMCCache",
    "DMS",
    "DMSCache",
    "Dense",
    "DenseCache",
    "EvictionCache",
    "ExpectedAttention",
    "FastGen",
    "H2O",
    "HeadSplit",
    "KVCache",
    "KVLayer",
    "KVView",
    "KeyDiff",
    "L2Norm",
    "LagKV",
    "Locret",
    "LocretCache",
    "LowRank",
    "LowRankCache",
    "Merge",
    "NACL",
    "Policy",
    "PyramidKV",
    "QuantCache",
    "Quantize",
    "RKV",
    "Random",
    "SnapKV",
    "Sparse",
    "SparseCache",
    "Streaming",
    "TOVA",
    "Threshold",
    "attach",
    "embedded_heads",
    "embedded_model",
    "prefill",
    "query_first",
    "use_backend",
]

_register()
_register_adapters()
