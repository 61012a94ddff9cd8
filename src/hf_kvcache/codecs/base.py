"""What a codec must offer."""

from __future__ import annotations

from dataclasses import fields

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
        projects: whether queries and outputs change basis (`project_query`, `project_output`).
    """

    format: str = ""
    payload: str | None = None
    channels_fixed: bool = True
    keeps_key_layout: bool = True
    needs: frozenset[str] = frozenset()
    shares_rows: bool = False
    heads_per_row: int = 1
    fitted_part: Codec | None = None
    projects: bool = False

    @property
    def parts(self) -> tuple[Codec, ...]:
        """What encodes one after another: itself, or both codecs of a chain."""
        return (self,)

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
        from hf_kvcache.codecs.chain import Chain

        return self if other.format == "dense" else Chain(self, other)

    def spec(self) -> dict:
        """JSON-able description, read back by `codec_from_spec`."""
        return {"codec": type(self).__name__} | {f.name: getattr(self, f.name) for f in fields(self)}


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
