"""Linear maps between the rows of a group of heads and their latents, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_kvcache.codecs.rotation import mixing
from hf_kvcache.shards import Shard

# directions with less than this share of the largest deviation are as good as empty: no latent may be scaled up by more
FLOOR = 1e-5


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


class Moments:
    """Running first and second moments of rows, per group of heads.

    Args:
        n_groups: `G`.
        width: `n`, channels of a group.
        device: where to accumulate.
        dtype: float64, or float32 on devices without it.
    """

    def __init__(self, n_groups: int, width: int, device=None, dtype: torch.dtype = torch.float64):
        self.count = 0
        self.total = torch.zeros(n_groups, width, dtype=dtype, device=device)
        self.second = torch.zeros(n_groups, width, width, dtype=dtype, device=device)

    def add(self, rows: torch.Tensor) -> None:
        """Count rows `[G, n_rows, n]`."""
        rows = rows.to(self.second.dtype)
        self.count += rows.shape[1]
        self.total += rows.sum(1)
        self.second.baddbmm_(rows.transpose(1, 2), rows)

    @property
    def mean(self) -> torch.Tensor:
        """`[G, n]`."""
        return self.total / max(self.count, 1)

    def covariance(self, centred: bool) -> torch.Tensor:
        """`E[x xᵀ]` `[G, n, n]`, around the mean or around zero."""
        second = self.second / max(self.count, 1)
        return second - self.mean.unsqueeze(2) * self.mean.unsqueeze(1) if centred else second


def principal(
    covariance: torch.Tensor, group_size: int, mean: torch.Tensor | None = None, metric: torch.Tensor | None = None
) -> tuple[Basis, torch.Tensor]:
    """The best basis for rows of this covariance: the top directions lose the least, at every rank.

    Projecting on the eigenvectors `U` of `E[k kᵀ]` equals the truncated whitened SVD of the weights that produce `k`
    (Palu, arXiv 2407.21118), without the inverse of a Gram matrix. With a metric `M` the loss is `eᵀ M e` instead of
    `eᵀ e`: eigenvectors of `M^½ C M^½`, and the projection is oblique.

    Args:
        covariance: `[G, n, n]`; the arithmetic is float64.
        group_size: heads of a group.
        mean: `[G, n]`, where the covariance is centred.
        metric: positive definite `[G, n, n]`, or None for the identity.

    Returns:
        The basis of full rank, its latents having the square roots of the deviations as their deviations, and the
        loss that every direction saves, float64 `[G, n]`, descending.
    """
    covariance = covariance.double()
    root, inverse = _roots(metric.double()) if metric is not None else (None, None)
    if root is not None:
        covariance = root @ covariance @ root
    values, vectors = torch.linalg.eigh((covariance + covariance.transpose(1, 2)) / 2)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    deviation = values.sqrt()
    scale = deviation.clamp(min=torch.finfo(torch.float64).tiny)
    scale = torch.maximum(scale, deviation[:, :1] * FLOOR).clamp(min=FLOOR).sqrt()  # [G, n]
    down, up = vectors / scale.unsqueeze(1), (vectors * scale.unsqueeze(1)).transpose(1, 2)
    if root is not None:
        down, up = root @ down, up @ inverse
    up = up.unflatten(2, (group_size, -1)).transpose(1, 2)  # [G, s, r, D]
    held = {"down": down, "up": up} | ({} if mean is None else {"mean": mean})
    return Basis(**{name: t.float().contiguous() for name, t in held.items()}), values


def _roots(metric):
    """Square root of a positive semi-definite matrix and its inverse, small eigenvalues lifted."""
    values, vectors = torch.linalg.eigh((metric + metric.transpose(1, 2)) / 2)
    values = torch.maximum(values, values[:, -1:] * 1e-6).clamp(min=1e-30).sqrt().unsqueeze(1)
    return (vectors * values) @ vectors.transpose(1, 2), (vectors / values) @ vectors.transpose(1, 2)


def by_group(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Rows of heads `[B, Hkv, n, D]` as rows of groups `[B, Hkv / s, n, s * D]`."""
    return x.unflatten(1, (-1, group_size)).transpose(2, 3).flatten(3)
