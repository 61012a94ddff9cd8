"""Codecs: how a row is encoded."""

from hf_kvcache.codecs.base import Codec
from hf_kvcache.codecs.chain import Chain
from hf_kvcache.codecs.dense import Dense
from hf_kvcache.codecs.lowrank import LowRank
from hf_kvcache.codecs.quantize import Quantize
from hf_kvcache.codecs.sparse import Sparse

__all__ = ["Chain", "Codec", "Dense", "LowRank", "Quantize", "Sparse"]
