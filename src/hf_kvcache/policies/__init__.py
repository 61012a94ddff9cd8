"""Policies: which tokens stay."""

from hf_kvcache.policies.base import Policy
from hf_kvcache.policies.keydiff import KeyDiff
from hf_kvcache.policies.streaming import Streaming

__all__ = ["KeyDiff", "Policy", "Streaming"]
