"""What a codec must offer, and how codecs chain."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

# formats whose rows serve any head: a row is a list of values, quantised or not, and their places
ROWS = ("sparse", "sparse>int", "dense", "int")


class Codec:
    """How rows of K or V are encoded. A dataclass of its knobs; `a >> b` encodes what `a` leaves with `b`.

    Class attributes:
        format: name of the byte format, which picks the attention kernel.
        payload: the encoded tensor that a following codec may encode further, or None.
        channels_fixed: whether a channel of the payload is the same channel of the model in every row.
        keeps_key_layout: whether the payload of keys has what makes keys special, outliers in fixed channels.
        needs: what it reads beyond the rows: "queries", "positions", "model".
        shares_rows: whether several KV heads share a row.
        heads_per_row: how many (known once a layer has seen its first rows).
        fitted_part: itself or the codec of a chain that goes by constants, a `FittedCodec`; None without one.
    """

    format: str = ""
    payload: str | None = None
    channels_fixed: bool = True
    keeps_key_layout: bool = True
    needs: frozenset[str] = frozenset()
    shares_rows: bool = False
    heads_per_row: int = 1
    fitted_part: Codec | None = None

    @property
    def granularity(self) -> int:
        """Rows that are encoded together: 1 means any row can be kept or dropped."""
        return max(self.fields.values(), default=1)

    @property
    def fields(self) -> dict[str, int]:
        """Encoded tensors by name, and how many tokens one of their rows stands for."""
        raise NotImplementedError

    def store_type(self) -> type | None:
        """The class of stores that rows of this codec need; None for one of the layer alone."""

    def for_side(self, side: str) -> Codec:
        """This codec with the defaults of keys (`side="k"`) or values (`"v"`) filled in."""
        return self

    def when_followed_by(self, second: Codec) -> Codec:
        """This codec as it should be when `second` encodes what it leaves."""
        return self

    def with_fitted_part(self, part: Codec) -> Codec:
        """This codec with another one in the place of its `fitted_part`."""
        raise TypeError(f"{self} has no part that is fitted")

    def check(self, row: torch.Tensor) -> torch.Tensor | None:
        """Raise ValueError unless rows like these `[1, Hkv, n, D]` can be encoded; returns the payload."""
        self.nbytes_per_token(row.shape[3], row.element_size())
        return self.encode(row, row[:, :, :1].unsqueeze(3)).get(self.payload)

    def encode(
        self, x: torch.Tensor, queries: torch.Tensor | None = None, positions: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Encode rows `[B, Hkv, n, D]`, `n` a multiple of `granularity`, into tensors `[B, H, rows, ...]`.

        Codecs that need them get the newest queries of the layer, `[B, Hkv, s, G, D]`, and the positions of the rows
        in RoPE, int32 `[B, 1 | Hkv, n]`.
        """
        raise NotImplementedError

    def decode(
        self,
        encoded: dict[str, torch.Tensor],
        dtype: torch.dtype,
        head_dim: int,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows `[B, Hkv, n, D]` in `dtype`, `head_dim` being `D`."""
        raise NotImplementedError

    def nbytes_per_token(self, head_dim: int, itemsize: int) -> float:
        """Bytes of one encoded row of one head: the promise that tests hold the store to."""
        raise NotImplementedError

    def payload_width(self, head_dim: int) -> int:
        """Channels of the payload at this head size."""
        raise NotImplementedError

    @property
    def projects(self) -> bool:
        """Whether queries and outputs change basis (`project_query`, `project_output`)."""
        return False

    def project_query(self, q: torch.Tensor) -> torch.Tensor:
        """Bring queries `[B, Hq, S, D]` into the basis in which this codec keeps keys."""
        return q

    def query_offset(self, q: torch.Tensor) -> torch.Tensor | None:
        """What every score of a projected query lacks, before scaling, float32 `[B, Hq, S]`; None for nothing."""
        return None

    def project_output(self, out: torch.Tensor) -> torch.Tensor:
        """Bring an output `[B, Hq, S, D]` back from the basis in which this codec keeps values."""
        return out

    def __rshift__(self, other: Codec) -> Codec:
        return self if other.format == "dense" else Chain(self, other)

    def spec(self) -> dict:
        """JSON-able description, read back by `codec_from_spec`."""
        return {"codec": type(self).__name__} | {f.name: getattr(self, f.name) for f in fields(self)}


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


def codec_from_spec(spec: dict | None) -> Codec | None:
    """The codec that `spec()` described."""
    if spec is None:
        return None
    kinds = {kind.__name__: kind for kind in _subclasses(Codec)}
    if spec.get("codec") not in kinds:
        raise ValueError(f"no codec is called {spec.get('codec')!r}")
    knobs = {k: codec_from_spec(v) if isinstance(v, dict) else v for k, v in spec.items() if k != "codec"}
    return kinds[spec["codec"]](**knobs)


def _subclasses(kind: type) -> set[type]:
    return {kind}.union(*(_subclasses(sub) for sub in kind.__subclasses__()))
