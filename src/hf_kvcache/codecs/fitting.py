"""Where the directions of low-rank latents come from: the moments of rows, and their principal directions."""

from __future__ import annotations

import torch

from hf_kvcache.codecs.basis import Basis
from hf_kvcache.codecs.lowrank import CHUNK, LowRank
from hf_kvcache.warn import warn_once

FITTED = (
    "the model carries no low-rank bases, so they are fitted to the prompt and held by the cache; "
    "`hf-kvcache calibrate lowrank` makes better ones once and for all"
)
# directions with less than this share of the largest deviation are as good as empty: no latent may be scaled up by more
FLOOR = 1e-5


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
    (Palu, Chang et al. 2025), without the inverse of a Gram matrix. With a metric `M` the loss is `eᵀ M e` instead of
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


def basis_of_rows(codec: LowRank, x: torch.Tensor, positions, is_real) -> Basis:
    """The principal directions of rows `x` `[B, Hkv, n, D]` as `codec` sees them (online, as xKV, Chang et al. 2025).

    Args:
        positions: of the rows in RoPE, int32 `[B, 1 | Hkv, n]`, or None.
        is_real: boolean `[B, n]`, which of them are no padding; None when all are.
    """
    moments = None
    for start in range(0, x.shape[2], CHUNK):
        rows = slice(start, start + CHUNK)
        grouped = codec.chunk(x, positions, rows).transpose(0, 1)  # [G, B, n, s * D]
        if moments is None:
            dtype = torch.float32 if x.device.type == "mps" else torch.float64
            moments = Moments(grouped.shape[0], grouped.shape[3], x.device, dtype)
        # one broken token must not break the basis of all
        counts = grouped.isfinite().all(-1).all(0)
        moments.add(grouped[:, counts if is_real is None else counts & is_real[:, rows]])
    warn_once(FITTED)
    mean = moments.mean if codec.centre else None
    return principal(moments.covariance(codec.centre), codec.group_size, mean)[0]
