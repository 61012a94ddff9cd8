"""The codec that changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from hf_kvcache.codecs.base import Codec


@dataclass(frozen=True)
class Dense(Codec):
    """Rows as they are: the neutral element of `>>`."""

    format = "dense"
    payload = "rows"

    @cached_property
    def fields(self):
        return {"rows": 1}

    def encode(self, x, queries=None, positions=None):
        return {"rows": x.contiguous()}

    def decode(self, encoded, dtype, head_dim, positions=None):
        return encoded["rows"].to(dtype)

    def nbytes_per_token(self, head_dim, itemsize):
        return head_dim * itemsize

    def payload_width(self, head_dim):
        return head_dim

    def __rshift__(self, other):
        return other
