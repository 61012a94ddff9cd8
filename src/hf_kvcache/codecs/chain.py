"""Two codecs, one after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_kvcache.codecs.base import Codec


@dataclass(frozen=True)
class Chain(Codec):
    """`first >> second`: the payload of the first codec is what the second one encodes."""

    first: Codec
    second: Codec

    def __post_init__(self):
        object.__setattr__(self, "first", self.first.when_followed_by(self.second))
        pair = f"{type(self.first).__name__} >> {type(self.second).__name__}"
        if self.first.payload is None:
            raise ValueError(f"{pair}: {self.first} leaves nothing that another codec can encode; put it last")
        if not self.first.channels_fixed and (self.second.granularity > 1 or self.second.projects):
            raise ValueError(
                f"{pair}: {self.second} treats a channel alike in several rows, and the channels that "
                f"{self.first} leaves differ from row to row; use Quantize(axis='token', rotate=False)"
            )
        if self.second.needs:
            needs = " and ".join(sorted(self.second.needs))
            raise ValueError(f"{pair}: {self.second} needs {needs} in the basis of the rows; put it first")

    @property
    def parts(self) -> tuple[Codec, ...]:
        return self.first, self.second

    @property
    def format(self) -> str:
        return f"{self.first.format}>{self.second.format}"

    @property
    def payload(self) -> str | None:
        return None if self.second.payload is None else f"second.{self.second.payload}"

    @property
    def channels_fixed(self) -> bool:
        return self.first.channels_fixed and self.second.channels_fixed

    @property
    def needs(self) -> frozenset[str]:
        return self.first.needs

    def payload_width(self, head_dim):
        return self.second.payload_width(self.first.payload_width(head_dim))

    @property
    def fields(self) -> dict[str, int]:
        own = {name: n for name, n in self.first.fields.items() if name != self.first.payload}
        return own | {f"second.{name}": n for name, n in self.second.fields.items()}

    @property
    def shares_rows(self) -> bool:
        return self.first.shares_rows

    @property
    def heads_per_row(self) -> int:
        return self.first.heads_per_row

    def store_type(self):
        return self.first.store_type()

    @property
    def fitted_part(self) -> Codec | None:
        return self.first.fitted_part

    def with_fitted_part(self, part):
        return Chain(self.first.with_fitted_part(part), self.second)

    def for_side(self, side: str) -> Codec:
        # what follows works row by row, as codecs of values do, unless the payload of keys still looks like keys
        keeps_key_layout = self.first.channels_fixed and self.first.keeps_key_layout
        return Chain(self.first.for_side(side), self.second.for_side(side if keeps_key_layout else "v"))

    def check(self, row):
        return self.second.check(self.first.check(row))

    def encode(self, x, queries=None, positions=None):
        return self.encode_payload(self.first.encode(x, queries, positions))

    def encode_payload(self, encoded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Encode what the first codec has left in `encoded` with the second one."""
        payload = self.second.encode(encoded.pop(self.first.payload))
        return encoded | {f"second.{name}": t for name, t in payload.items()}

    def decode(self, encoded, dtype, head_dim, positions=None):
        inner = {name: encoded[f"second.{name}"] for name in self.second.fields}
        outer = {name: encoded[name] for name in self.first.fields if name != self.first.payload}
        payload = self.second.decode(inner, dtype, self.first.payload_width(head_dim))
        return self.first.decode(outer | {self.first.payload: payload}, dtype, head_dim, positions)

    def nbytes_per_token(self, head_dim, itemsize):
        whole = self.first.nbytes_per_token(head_dim, itemsize)
        width = self.first.payload_width(head_dim)
        change = self.second.nbytes_per_token(width, itemsize) - width * itemsize
        return whole + change / self.first.heads_per_row

    @property
    def projects(self):
        return self.first.projects or self.second.projects

    def project_query(self, q):
        return self.second.project_query(self.first.project_query(q))

    def query_offset(self, q):
        return self.first.query_offset(q)

    def project_output(self, out):
        return self.first.project_output(self.second.project_output(out))

    def spec(self):
        return {"codec": "Chain", "first": self.first.spec(), "second": self.second.spec()}
