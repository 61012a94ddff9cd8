"""Linear maps between the rows of a group of heads and their latents."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_kvcache.shards import Shard


@dataclass(frozen=True, eq=False)
class Basis:
    """`latent = (x - mean) @ down`, `x ~ latent @ up + mean`, for the `G` groups of `s` heads of one side of a layer.

    Latent channels are in order of worth, so that a smaller rank is a prefix.

    Attributes:
        down: `[G, s * D, r]`.
        up: by head, `[G, s, r, D]`.
        mean: `[G, s * D]`, or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    mean: torch.Tensor | None = None
    _placed: dict = field(default_factory=dict, repr=False)

    @property
    def rank(self) -> int:
        """Latent channels per group: `r`."""
        return self.down.shape[-1]

    @property
    def width(self) -> int:
        """Channels of a group: `s * D`."""
        return self.down.shape[1]

    @property
    def group_size(self) -> int:
        """Heads of a group: `s`."""
        return self.up.shape[1]

    @property
    def n_groups(self) -> int:
        """`G`."""
        return self.down.shape[0]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What there is to save, by name."""
        held = {"down": self.down, "up": self.up, "mean": self.mean}
        return {name: t for name, t in held.items() if t is not None}

    def truncated(self, rank: int) -> Basis:
        """The first `rank` directions.

        Raises:
            ValueError: there are not that many.
        """
        if rank > self.rank:
            raise ValueError(f"a basis of rank {self.rank} has no {rank} directions; calibrate with a larger rank")
        return self if rank == self.rank else Basis(self.down[..., :rank], self.up[:, :, :rank], self.mean)

    def local_shard(self, shard: Shard) -> Basis:
        """The groups of heads that a process holds.

        Raises:
            ValueError: a group has heads of several processes.
        """
        if shard.count == 1:
            return self
        key = shard.rank, shard.count
        if key not in self._placed:
            if self.n_groups % shard.count:
                raise ValueError(
                    f"the basis has {self.n_groups} groups of {self.group_size} heads, which cannot be shared out "
                    f"among {shard.count} processes; use one with a smaller group_size"
                )
            self._placed[key] = Basis(**{name: shard.local_shard(t, 0) for name, t in self.tensors.items()})
        return self._placed[key]

    def mixed(self) -> Basis:
        """The same subspace with latents that share out the energy of the leading ones, so that they round well.

        An orthogonal `Q` is folded in: `down Q`, `Qᵀ up` (Palu, arXiv 2407.21118).
        """
        from hf_kvcache.codecs.rotation import mixing

        q = mixing(self.rank, self.down.device)
        return Basis(self.down.float() @ q, q.T @ self.up.float(), self.mean)

    def placed(self, rank: int, is_mixed: bool, dtype: torch.dtype, device: torch.device) -> Basis:
        """This basis as a cache works with it; caches of one model share the result."""
        key = rank, is_mixed, dtype, torch.device(device)
        if key not in self._placed:
            basis = self.truncated(rank)
            basis = basis.mixed() if is_mixed else basis
            # copies of exactly this size: a slice would keep the whole basis alive
            where = {"device": device, "copy": True, "memory_format": torch.contiguous_format}
            placed = {name: t.detach().to(dtype=dtype, **where) for name, t in basis.tensors.items()}
            if basis.mean is not None:
                placed["mean"] = basis.mean.detach().to(dtype=torch.float32, **where)
            self._placed[key] = Basis(**placed)
        return self._placed[key]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Latents `[B, G, n, r]` of rows by group `[B, G, n, s * D]`, in the dtype of `x`."""
        x = x if self.mean is None else x - self.mean.to(x.dtype).unsqueeze(1)
        return x @ self.down.to(x.dtype)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Rows by head `[B, Hkv, n, D]` of latents `[B, G, n, r]`, in the dtype of the latents."""
        rows = (latents.unsqueeze(2) @ self.up.to(latents.dtype)).flatten(1, 2)
        return rows if self.mean is None else rows + self.mean_by_head.to(rows.dtype).unsqueeze(1)

    def __deepcopy__(self, memo) -> Basis:
        # constants: copies of a cache share them
        return self

    def __getstate__(self) -> dict:
        # what is derived from the tensors need not be pickled
        return vars(self) | {"_placed": {}}

    @property
    def up_by_head(self) -> torch.Tensor:
        """`[Hkv, r, D]`."""
        return self.up.flatten(0, 1)

    @property
    def mean_by_head(self) -> torch.Tensor | None:
        """`[Hkv, D]`, or None."""
        return None if self.mean is None else self.mean.unflatten(1, (self.group_size, -1)).flatten(0, 1)


def by_group(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Rows of heads `[B, Hkv, n, D]` as rows of groups `[B, Hkv / s, n, s * D]`."""
    return x.unflatten(1, (-1, group_size)).transpose(2, 3).flatten(3)
