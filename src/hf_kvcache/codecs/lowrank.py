"""Rows as low-rank latents of a group of heads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from hf_kvcache.codecs.basis import Basis, by_group
from hf_kvcache.codecs.fitted import FittedCodec
from hf_kvcache.rope import Rope

CHUNK = 4096  # rows that are brought to float32 at a time


@dataclass(frozen=True)
class LowRank(FittedCodec):
    """Latents instead of rows, expanded inside attention (Palu, arXiv 2407.21118).

    Keys are taken back before RoPE, where a head has its subspace, and rotated again when they are rebuilt; with
    `rope="post"` they are projected as they are, and attention projects the query instead of rebuilding keys (Eigen
    Attention, arXiv 2408.05646; MatryoshkaKV, arXiv 2410.14731). Values are summed as latents and expanded once per
    query.

    Attributes:
        rank: latent channels per group, or their share of the group's channels, rounded to a step of the kernels
            (`step_of`). None means what the basis was calibrated for, half without one.
        group_size: KV heads that share latents, or "all" (joint). None means that of the basis, 1 without one: a basis
            that is fitted to the prompt is part of the cache, and that of many heads would take much of it.
        rope: "pre" or "post": where keys are projected; None means as the basis, "pre" without one. Values have no
            RoPE.
        mix: share out the energy of the leading latents, so that they round well. None does so before `Quantize`.
        centre: subtract the mean row, where the basis is fitted to the prompt.
        share_layers: neighbouring layers that share latents, those of all their heads (xKV, arXiv 2503.18893). Their
            basis is fitted to the prompt; `rank` is out of the channels of all of them.
        bases: the bases of a model (`adapters.Bases`); None asks the model for its adapter, then fits to the prompt.
    """

    rank: int | float | None = None
    group_size: int | str | None = None
    rope: str | None = None
    mix: bool | None = None
    centre: bool = True
    share_layers: int = 1
    bases: object = field(default=None, repr=False, compare=False)
    # what a layer fills in
    side: str | None = field(default=None, repr=False)
    basis: Basis | None = field(default=None, repr=False, compare=False)
    rotary: Rope | None = field(default=None, repr=False, compare=False)
    constants_in_cache: bool = field(default=False, repr=False)

    payload = "latents"
    keeps_key_layout = False
    projects = True

    def __post_init__(self):
        is_share = isinstance(self.rank, float) and 0 < self.rank <= 1
        if self.rank is not None and not is_share and (isinstance(self.rank, float) or self.rank < 1):
            raise ValueError(f"rank={self.rank!r} is neither a share in (0, 1] nor a number of channels")
        if self.rope not in (None, "pre", "post"):
            raise ValueError(f'rope={self.rope!r} is neither "pre" nor "post"')
        is_number = isinstance(self.group_size, int) and self.group_size > 0
        if self.group_size not in (None, "all") and not is_number:
            raise ValueError(f'group_size={self.group_size!r} is neither a number of KV heads nor "all"')
        if not isinstance(self.share_layers, int) or self.share_layers < 1:
            raise ValueError(f"share_layers={self.share_layers!r} is not a number of layers")
        if self.share_layers > 1 and self.bases is not None:
            raise ValueError(f"share_layers={self.share_layers} is fitted to the prompt; bases are of single layers")

    @property
    def format(self):
        return "lowrank/rope" if self.rotates else "lowrank"

    @property
    def rotates(self) -> bool:
        """Whether rows are taken back before RoPE."""
        return self.side == "k" and self.rope != "post"

    @property
    def needs(self):
        return frozenset({"model", "positions"} if self.rotates else {"model"})

    @property
    def fields(self):
        return {"latents": 1}

    @property
    def shares_rows(self):
        return self.group_size not in (None, 1) or self.share_layers > 1

    @property
    def heads_per_row(self):
        return self.group_size * self.share_layers

    @property
    def is_unfitted(self):
        return self.basis is None

    # -- what a layer fills in ---------------------------------------------------------------------------------------

    def store_type(self):
        if self.share_layers == 1:
            return None
        from hf_kvcache.stores.shared import SharedStore

        return SharedStore

    def for_side(self, side):
        return replace(self, side=side)

    def when_followed_by(self, second):
        return replace(self, mix=True) if self.mix is None and second.format.startswith("int") else self

    def for_shape(self, n_kv_heads, head_dim):
        if self.share_layers > 1:
            if self.group_size not in (None, "all", n_kv_heads):
                raise ValueError(
                    f"group_size={self.group_size}, but layers that share latents share those of all heads"
                )
            # how many layers there are to share decides the rank
            return replace(self, group_size=n_kv_heads)
        group_size = n_kv_heads if self.group_size == "all" else self.group_size or 1
        if n_kv_heads % group_size:
            raise ValueError(f"group_size={group_size} does not divide {n_kv_heads} KV heads")
        rank = channels_of(0.5 if self.rank is None else self.rank, group_size * head_dim)
        return replace(self, group_size=group_size, rank=rank)

    def for_model(self, context):
        found = made_for = None
        if self.basis is None and self.share_layers == 1:
            found, made_for = context.basis(self.side, self.bases) or (None, None)
        if found is not None and self.side == "k" and self.rope not in (None, made_for):
            raise ValueError(f'the basis is of keys {made_for}-RoPE, the cache says rope="{self.rope}"')
        bound = replace(self, rope=self.rope or made_for)
        rotary = context.rope() if bound.rotates else None
        if bound.rotates and rotary is None:
            # a layer without RoPE has nothing to take back
            bound = replace(bound, rope="post")
        bound = replace(bound, rotary=rotary)
        if self.basis is not None:
            return bound
        if found is None:
            return bound.for_shape(context.n_kv_heads, context.head_dim)
        wanted = context.n_kv_heads if self.group_size == "all" else self.group_size
        if wanted not in (None, found.group_size):
            raise ValueError(f"group_size={self.group_size}, but the basis was made for {found.group_size}")
        rank = found.rank if self.rank is None else channels_of(self.rank, found.width)
        basis = found.placed(rank, bool(self.mix), context.dtype, context.device)
        return replace(bound, group_size=found.group_size, rank=rank, basis=basis)

    def alone(self):
        return replace(self, rotary=None, bases=None)

    def fitted(self, x, positions=None, is_real=None):
        """With the principal directions of the rows `x` `[B, Hkv, n, D]` (xKV, arXiv 2503.18893: fitted online)."""
        from hf_kvcache.codecs.fitting import basis_of_rows

        basis = basis_of_rows(self, x, positions, is_real)
        return replace(self, basis=basis.placed(self.rank, bool(self.mix), x.dtype, x.device), constants_in_cache=True)

    def rank_within(self, width):
        """Latent channels for `width` channels; layers that are left over make a smaller group, of `rank` at most."""
        return channels_of(0.5 if self.rank is None else min(self.rank, width), width)

    def constants(self):
        return {} if self.basis is None else self.basis.tensors

    def with_constants(self, tensors):
        if not tensors:
            return self
        if self.share_layers > 1:
            from hf_kvcache.codecs.joint import JointBasis

            basis = JointBasis(**tensors)
        else:
            basis = Basis(**tensors)
        return replace(self, basis=basis, rank=basis.rank, constants_in_cache=True)

    # -- encode and decode -------------------------------------------------------------------------------------------

    def check(self, row):
        own = self.for_shape(row.shape[1], row.shape[3])
        rank = 0.5 if own.rank is None else own.rank
        return row.new_zeros(*row.shape[:3], channels_of(rank, own.heads_per_row * row.shape[3]))

    def encode(self, x, queries=None, positions=None):
        if x.shape[2] <= CHUNK:
            return {"latents": self.basis.encode(self.grouped(x, positions)).to(x.dtype)}
        latents = x.new_empty(x.shape[0], x.shape[1] // self.group_size, x.shape[2], self.rank)
        for start in range(0, x.shape[2], CHUNK):
            rows = slice(start, start + CHUNK)
            latents[:, :, rows] = self.basis.encode(self.chunk(x, positions, rows))
        return {"latents": latents}

    def decode(self, encoded, dtype, head_dim, positions=None):
        rows = self.basis.decode(encoded["latents"].float())
        if self.rotates:
            rows = self._known_rope().rotate(rows, positions)
        return rows.to(dtype)

    def chunk(self, x, positions, rows):
        """`grouped` rows of a slice of them."""
        return self.grouped(x[:, :, rows], None if positions is None else positions[:, :, rows])

    def grouped(self, x, positions=None):
        """Rows of keys or values as the basis sees them: before RoPE where it does, by group, in float32."""
        x = x.float()
        if self.rotates:
            x = self._known_rope().unrotate(x, positions)
        return by_group(x, self.group_size)

    def _known_rope(self):
        if self.rotary is None:
            raise ValueError(
                "keys were projected before RoPE, and the model whose RoPE it is has not been seen yet: load the cache "
                "with model=, or let the model run first"
            )
        return self.rotary

    def payload_width(self, head_dim):
        return self.rank

    def nbytes_per_token(self, head_dim, itemsize):
        return self.rank * itemsize / self.heads_per_row

    # -- attention in the space of latents ---------------------------------------------------------------------------

    def project_query(self, q):
        """With `rope="post"`, queries `[B, Hq, S, D]` as `[B, Hq, S, r]`; before RoPE they stay as they are."""
        if self.rotates:
            return q
        up = self.basis.up_by_head  # [Hkv, r, D]
        return (by_kv_head(q, up.shape[0]) @ up.transpose(1, 2)).reshape(*q.shape[:3], -1)

    def query_offset(self, q):
        """What the mean key adds to every score of a projected query, float32 `[B, Hq, S]`; None where nothing."""
        if self.rotates or self.basis.mean is None:
            return None
        mean = self.basis.mean_by_head.float().unsqueeze(2)  # [Hkv, D, 1]
        return (by_kv_head(q.float(), mean.shape[0]) @ mean).reshape(q.shape[:3])

    def project_output(self, out):
        """Sums of latents `[B, Hq, S, r]` as outputs `[B, Hq, S, D]`."""
        # in the dtype of the cache: bringing the expansion to float32 would take longer than using it
        up = self.basis.up_by_head
        rows = by_kv_head(out.to(up.dtype), up.shape[0]) @ up
        if self.basis.mean is not None:
            rows = rows + self.basis.mean_by_head.to(up.dtype).unsqueeze(1)
        return rows.reshape(*out.shape[:3], -1)

    def spec(self):
        knobs = ("rank", "group_size", "rope", "mix", "centre", "share_layers", "side")
        return {"codec": "LowRank"} | {name: getattr(self, name) for name in knobs}


def channels_of(rank: int | float, width: int) -> int:
    """A rank, given as a number or as a share of `width` channels, as a number.

    Raises:
        ValueError: more than `width`.
    """
    if isinstance(rank, int):
        if rank > width:
            raise ValueError(f"rank={rank} is more than the {width} channels of a group")
        return rank
    step = step_of(width)
    return min(max(round(rank * width / step), 1) * step, width)


def step_of(width: int) -> int:
    """What ranks given as a share are multiples of: the tile of the kernels, or less for tiny heads."""
    return 16 if width >= 64 else 4 if width >= 16 else 1


def by_kv_head(x: torch.Tensor, n_kv_heads: int) -> torch.Tensor:
    """Queries or outputs `[B, Hq, S, c]` of one KV head as rows: `[B, Hkv, G * S, c]`."""
    return x.unflatten(1, (n_kv_heads, -1)).flatten(2, 3)
