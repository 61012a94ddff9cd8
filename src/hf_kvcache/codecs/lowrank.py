"""Rows as low-rank latents of a group of heads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from hf_kvcache.codecs.base import Codec
from hf_kvcache.codecs.basis import Basis, Moments, by_group, by_head, principal
from hf_kvcache.codecs.quantize import Quantize
from hf_kvcache.rope import Rope

STEP = 16  # ranks that are given as a share are multiples of this: the tile of the kernels
CHUNK = 4096  # rows that are brought to float32 at a time


@dataclass(frozen=True)
class LowRank(Codec):
    """Latents instead of rows, expanded inside attention (Palu, Chang et al. 2025).

    Keys are taken back before RoPE, where a group of heads has a common subspace, and rotated again when they are
    rebuilt; with `rope="post"` they are projected as they are, and queries are projected instead of keys rebuilt
    (Eigen Attention, Saxena et al. 2024; MatryoshkaKV, Lin et al. 2024). Values are summed as latents and expanded
    once per query.

    Attributes:
        rank: latent channels per group, or their share of the group's channels (rounded to a multiple of 16); None
            takes what the basis was calibrated for.
        group_size: KV heads that share latents; "all" is joint, None is 1 for keys and "all" for values.
        rope: "pre" or "post": where keys are projected. Values have no RoPE.
        mix: share out the energy of the leading latents, so that they round well; None does so before `Quantize`.
        centre: subtract the mean row, where the basis is fitted on the prompt.
        basis: the projection; None until the model, its adapter or the prompt supplies one.
        rotary: the model's RoPE; None until the model is known.
        is_fitted: whether the basis was made for this cache, and so counts among its bytes.
    """

    rank: int | float | None = 0.5
    group_size: int | str | None = None
    rope: str = "pre"
    mix: bool | None = None
    centre: bool = True
    side: str | None = None
    basis: Basis | None = field(default=None, repr=False)
    rotary: Rope | None = field(default=None, repr=False)
    is_fitted: bool = field(default=False, repr=False)

    carrier = "latents"
    carries_side = False

    def __post_init__(self):
        is_share = isinstance(self.rank, float) and 0 < self.rank <= 1
        if self.rank is not None and not is_share and (isinstance(self.rank, float) or self.rank < 1):
            raise ValueError(f"rank={self.rank!r} is neither a share in (0, 1] nor a number of channels")
        if self.rope not in ("pre", "post"):
            raise ValueError(f'rope={self.rope!r} is neither "pre" nor "post"')
        is_number = isinstance(self.group_size, int) and self.group_size > 0
        if self.group_size not in (None, "all") and not is_number:
            raise ValueError(f'group_size={self.group_size!r} is neither a number of KV heads nor "all"')

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def format(self):
        return "lowrank/rope" if self.rotates else "lowrank"

    @property
    def rotates(self) -> bool:
        """Whether rows are taken back before RoPE."""
        return self.side == "k" and self.rope == "pre"

    @property
    def needs(self):
        return frozenset({"positions", "model"} if self.rotates else {"model"})

    @property
    def fields(self):
        return {"latents": 1}

    @property
    def heads_per_row(self):
        group_size = self.group_size or (1 if self.side == "k" else "all")
        return 2 if group_size == "all" else group_size

    def for_side(self, side):
        return replace(self, side=side)

    def for_shape(self, n_kv_heads, head_dim):
        group_size = self.group_size or (1 if self.side == "k" else "all")
        group_size = n_kv_heads if group_size == "all" else group_size
        if n_kv_heads % group_size:
            raise ValueError(f"group_size={group_size} does not divide {n_kv_heads} KV heads")
        bound = replace(self, group_size=group_size)
        if self.rank is None:
            # until a basis says better
            return bound if self.basis is not None else replace(bound, rank=channels(0.5, group_size * head_dim))
        rank = channels(self.rank, group_size * head_dim)
        if rank > group_size * head_dim:
            raise ValueError(f"rank={rank} is more than the {group_size * head_dim} channels of a group")
        return replace(bound, rank=rank)

    def before(self, other):
        """This codec as the first of a chain."""
        return replace(self, mix=True) if self.mix is None and isinstance(other, Quantize) else self

    def for_model(self, known):
        """With what the model supplies: its RoPE, and the basis that it or its adapter carries."""
        rotary = known.rope() if self.rotates else None
        if self.basis is not None:
            return replace(self, rotary=rotary)
        basis = known.basis(self.side, self.group_size, self.rope)
        if basis is None:
            return replace(self, rotary=rotary)
        return replace(self, rotary=rotary, basis=basis)

    # -- encode and decode -------------------------------------------------------------------------------------------

    @property
    def is_unfitted(self):
        return self.basis is None

    def fitted(self, x, positions=None, is_real=None):
        """With a basis of the rows `x` `[B, Hkv, n, D]`, padding left out (`is_real` `[B, n]`): online PCA."""
        moments = None
        for start in range(0, x.shape[2], CHUNK):
            stop = min(start + CHUNK, x.shape[2])
            rows = self._grouped(x, positions, start, stop).transpose(0, 1)  # [G, B, n, s*D]
            if moments is None:
                moments = Moments(rows.shape[0], rows.shape[3], rows.device, accumulator(rows.device))
            rows = rows.flatten(1, 2) if is_real is None else rows[:, is_real[:, start:stop]]
            moments.add(rows)
        mean = moments.mean if self.centre else None
        basis, _ = principal(moments.covariance(self.centre), mean)
        return replace(
            self, basis=basis.placed(self.rank, bool(self.mix), x.dtype, x.device), mix=False, is_fitted=True
        )
