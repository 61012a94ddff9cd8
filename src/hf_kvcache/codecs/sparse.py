"""Rows of which only the largest channels are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from hf_kvcache.codecs.base import Codec
from hf_kvcache.codecs.saliency import NEEDS_QUERIES, OF_VALUES, RULES
from hf_kvcache.kernels.sparse_pack import LAYOUTS, check_format, sparse_pack, sparse_unpack

BLOCK = 32  # tokens among which a channel chooses with axis="channel": the paper's group
STEP = 4  # kept channels are a multiple of this, so that rows stay aligned and can be quantised


@dataclass(frozen=True)
class Sparse(Codec):
    """Unstructured sparsity with the same number of kept channels in every row (Mustafar, arXiv 2505.22913).

    Attributes:
        sparsity: share of the channels to drop, `0 <= sparsity < 1`; what is kept is rounded up to a multiple of 4.
        keep: or the number of channels to keep, exactly.
        layout: "bitmap" (a bit per channel: least memory) or "index" (a byte per kept channel).
        rule: "magnitude"; "output_aware" (keys, weighs channels by the newest queries); "think" (whole channels, ThinK,
            arXiv 2407.21018: a baseline). For values "output_aware" is the same as "magnitude".
        axis: "token" chooses among the channels of a row; "channel" among 32 tokens of a channel, which packs 32 rows
            together (the paper's rule for values that it compares with) and keeps `keep` or `1 - sparsity` of those 32.
        group_size: keep an equal share of every group of this many adjacent channels: 4 with sparsity 0.5 is the
            2:4 pattern. None chooses among the whole row.
    """

    sparsity: float | None = None
    keep: int | None = None
    layout: str = "bitmap"
    rule: str = "magnitude"
    axis: str = "token"
    group_size: int | None = None

    channels_fixed = False

    def __post_init__(self):
        if (self.sparsity is None) == (self.keep is None):
            raise ValueError("Sparse: give either sparsity= (share to drop) or keep= (channels to keep)")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} is not in [0, 1)")
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"keep={self.keep} is not at least 1")
        for name, allowed in (("layout", LAYOUTS), ("rule", RULES), ("axis", ("token", "channel"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.axis == "channel" and (self.rule != "magnitude" or self.group_size is not None):
            raise ValueError('axis="channel" chooses by magnitude among 32 tokens: leave out rule and group_size')

    @property
    def format(self):
        return "sparse" if self.axis == "token" else "sparse/channel"

    @property
    def payload(self):
        return "values" if self.axis == "token" else None

    @property
    def needs(self):
        return frozenset({"queries"} if self.rule in NEEDS_QUERIES else ())

    @property
    def fields(self):
        per_row = 1 if self.axis == "token" else BLOCK
        return {"values": per_row, "places": per_row}

    def for_side(self, side):
        return replace(self, rule=OF_VALUES.get(self.rule, self.rule)) if side == "v" else self

    def payload_width(self, head_dim):
        """Channels kept of `head_dim` (tokens kept of 32 with `axis="channel"`)."""
        if self.keep is not None:
            return self.keep
        among = head_dim if self.axis == "token" else BLOCK
        group = self.group_size or among
        step = STEP if self.group_size is None else 1
        # 0.7 * 10 is a little more than 7 in floating point; such dust must not keep one more channel
        kept = ceil(round((1 - self.sparsity) * group, 6) / step) * step
        return min(kept, group) * among // group

    def encode(self, x, queries=None, positions=None):
        knobs = {"keep": self.payload_width(x.shape[-1]), "layout": self.layout, "group_size": self.group_size}
        if self.axis == "channel":
            columns = x.unflatten(2, (-1, BLOCK)).transpose(3, 4)  # [B, Hkv, n / 32, D, 32]
            packed = (t.unflatten(2, columns.shape[2:4]) for t in sparse_pack(columns.flatten(2, 3), **knobs))
        else:
            worth = RULES[self.rule](x, queries)
            packed = sparse_pack(x, importance=None if worth is None else worth.expand_as(x), **knobs)
        return dict(zip(("values", "places"), packed, strict=True))

    def decode(self, encoded, dtype, head_dim, positions=None):
        width = head_dim if self.axis == "token" else BLOCK
        x = sparse_unpack(encoded["values"], encoded["places"], layout=self.layout, head_dim=width).to(dtype)
        return x if self.axis == "token" else x.transpose(3, 4).flatten(2, 3)

    def nbytes_per_token(self, head_dim, itemsize):
        keep, among = self.payload_width(head_dim), head_dim if self.axis == "token" else BLOCK
        check_format(among, keep, self.layout, self.group_size)
        row = keep * itemsize + (keep if self.layout == "index" else ceil(among / 8))
        return row if self.axis == "token" else row * head_dim / BLOCK
