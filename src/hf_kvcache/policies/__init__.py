"""Policies: which tokens stay."""

import hf_kvcache.dmc.policies as _trained
from hf_kvcache.former_names import former
from hf_kvcache.policies.adakv import AdaKV
from hf_kvcache.policies.base import Policy
from hf_kvcache.policies.chunkkv import ChunkKV
from hf_kvcache.policies.duo import Duo
from hf_kvcache.policies.expected_attention import ExpectedAttention
from hf_kvcache.policies.fastgen import FastGen
from hf_kvcache.policies.h2o import H2O
from hf_kvcache.policies.keydiff import KeyDiff
from hf_kvcache.policies.kvzip import KVzip
from hf_kvcache.policies.l2norm import L2Norm
from hf_kvcache.policies.lagkv import LagKV
from hf_kvcache.policies.locret import Locret
from hf_kvcache.policies.merge import Merge
from hf_kvcache.policies.nacl import NACL
from hf_kvcache.policies.pyramidkv import PyramidKV
from hf_kvcache.policies.random import Random
from hf_kvcache.policies.rkv import RKV
from hf_kvcache.policies.snapkv import SnapKV
from hf_kvcache.policies.streaming import Streaming
from hf_kvcache.policies.threshold import Threshold
from hf_kvcache.policies.tova import TOVA
from hf_kvcache.policies.triattention import TriAttention

__all__ = [
    "AdaKV",
    "ChunkKV",
    "DMC",
    "DMS",
    "ExpectedAttention",
    "FastGen",
    "H2O",
    "Duo",
    "KVzip",
    "KeyDiff",
    "L2Norm",
    "LagKV",
    "Locret",
    "Merge",
    "NACL",
    "Policy",
    "PyramidKV",
    "RKV",
    "Random",
    "SnapKV",
    "Streaming",
    "TOVA",
    "Threshold",
    "TriAttention",
]
_former = former(__name__, {"HeadSplit": "Duo"}, globals())


def __getattr__(name: str):
    # where these are imported first, they ask for policies before there are any of them
    return getattr(_trained, name) if name in ("DMC", "DMS") else _former(name)
