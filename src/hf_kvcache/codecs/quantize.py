"""Integer codes with a scale and a mid-point per group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from hf_kvcache.codecs.base import Codec
from hf_kvcache.kernels.quant_pack import quant_pack, quant_unpack
from hf_kvcache.kernels.quant_pack.reference import PLANES, WORD

BLOCK = 32  # rows that share a per-channel scale: KIVI's group of 32 tokens


@dataclass(frozen=True)
class Quantize(Codec):
    """Asymmetric round-to-nearest quantisation (KIVI, arXiv 2402.02750, section 3).

    Attributes:
        bits: 8, 4, 3 or 2.
        axis: "channel" shares a scale among 32 tokens of a channel, "token" among channels of a token.
            None means "channel" for keys, whose outliers sit in fixed channels, and "token" for values.
        group_size: channels that share a scale of a token; None picks 64 (32 at 2 bits) or the nearest
            width that the packed words allow. Channel scales always span blocks of 32 tokens.
        rotate: mix the channels of a row by a Hadamard matrix first (QuaRot, arXiv 2404.00456).
    """

    bits: int = 4
    axis: str | None = None
    group_size: int | None = None
    rotate: bool = False

    def __post_init__(self):
        if self.bits not in PLANES:
            raise ValueError(f"bits={self.bits} is not one of {', '.join(map(str, sorted(PLANES)))}")
        if self.axis not in (None, "channel", "token"):
            raise ValueError(f"axis={self.axis!r} is neither 'channel' nor 'token' (nor None: the best for each side)")

    @cached_property
    def format(self):
        return "int/channel" if self.axis == "channel" else "int"

    @cached_property
    def fields(self):
        per_scale = BLOCK if self.axis == "channel" else 1
        return {"codes": 1, "scale": per_scale, "zero": per_scale}

    def for_side(self, side):
        return replace(self, axis=self.axis or ("channel" if side == "k" else "token"))

    def encode(self, x, queries=None, positions=None):
        x = self._rotated(x)
        group_size = BLOCK if self.axis == "channel" else self.channels_per_group(x.shape[-1])
        return dict(
            zip(("codes", "scale", "zero"), quant_pack(x, bits=self.bits, axis=self.axis, group_size=group_size))
        )

    def decode(self, encoded, dtype, head_dim, positions=None):
        codes, scale, zero = (encoded[name] for name in ("codes", "scale", "zero"))
        x = quant_unpack(codes, scale, zero, bits=self.bits, axis=self.axis, dtype=dtype)
        return self._rotated(x)

    def channels_per_group(self, head_dim: int) -> int:
        """The group size of a token scale at this head size."""
        if self.group_size is not None:
            return self.group_size
        # one field of the packed words never straddles two groups, so kernels scale whole fields
        field = max(head_dim * min(PLANES[self.bits]) // WORD, 1)
        wanted = min(head_dim, 32 if self.bits == 2 else 64)
        return next(n for n in range(wanted, head_dim + 1) if head_dim % n == 0 and n % field == 0)

    def nbytes_per_token(self, head_dim, itemsize):
        scales = head_dim / BLOCK if self.axis == "channel" else head_dim / self.channels_per_group(head_dim)
        return head_dim * self.bits / 8 + scales * 4

    @cached_property
    def projects(self):
        return self.rotate

    def project_query(self, q):
        return self._rotated(q)

    def project_output(self, out):
        return self._rotated(out)

    def _rotated(self, x):
        if not self.rotate:
            return x
        from hf_kvcache.codecs.rotation import rotate

        return rotate(x)
