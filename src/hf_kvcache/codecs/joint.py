"""A basis for the rows of several layers together, fitted to a prompt (xKV, Chang et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from hf_kvcache.codecs.basis import FLOOR, Basis, Moments
from hf_kvcache.codecs.rotation import mixing


@dataclass(frozen=True, eq=False)
class JointBasis(Basis):
    """What one layer holds of a basis that `L` layers share: `x ~ latent @ up + mean`.

    Latents are the least-squares ones, `(sum over the layers of (x - mean) @ upᵀ) @ inverse(up @ upᵀ)`. The small
    inverse stands in for a `down` of the size of `up`: a basis that is fitted to a prompt is part of the cache.

    Attributes:
        down: the inverse, over all layers, which hold the same tensor: float32 `[1, r, r]` where latents are mixed;
            else the directions are orthogonal, and it is the diagonal `[1, r]`.
        up: of this layer's heads, `[1, Hkv, r, D]`.
        mean: of this layer's channels, float32 `[1, Hkv * D]`, or None.
    """

    @property
    def width(self) -> int:
        return self.up.shape[1] * self.up.shape[3]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """This layer's part of the latents, `[B, 1, n, r]`, of rows `[B, 1, n, Hkv * D]`; they add up."""
        x = x if self.mean is None else x - self.mean.to(x.dtype).unsqueeze(1)
        inner = x @ self.up.transpose(2, 3).flatten(1, 2).to(x.dtype)
        down = self.down.to(x.dtype)
        return inner @ down if down.dim() == 3 else inner * down


def fit_jointly(
    chunks: Iterable[torch.Tensor],
    n_rows: int,
    heads: list[tuple[int, int]],
    rank: int,
    *,
    is_mixed: bool = False,
    centre: bool = True,
    dtype: torch.dtype = torch.float32,
) -> list[JointBasis]:
    """The principal directions of rows that several layers side by side make up, in float64.

    Args:
        chunks: the rows `[n, W]`, some at a time.
        n_rows: about how many in all: below `W` the Gram matrix of the rows is decomposed, else their covariance.
        heads: `(Hkv, D)` of every layer; `W` is the sum of their products.
        rank: directions to keep.
        is_mixed: share out the energy of the leading latents (`Basis.mixed`).
        centre: around the mean row, or around zero.
        dtype: of `up`.

    Returns:
        The part of every layer.
    """
    widths = [n_heads * head_dim for n_heads, head_dim in heads]
    find = _of_few_rows if n_rows < sum(widths) else _of_many_rows
    vectors, deviation, mean = find(chunks, sum(widths), rank, centre)
    # latents with the square roots of the deviations as their deviations, as those of `principal`
    scale = torch.maximum(deviation, deviation[:1] * FLOOR).clamp(min=FLOOR).sqrt()
    up = (vectors * scale).T  # [r, W]
    if is_mixed:
        up = mixing(rank, up.device).double().T @ up
    # the inverse is that of the rounded directions, because rows are rebuilt from those
    up = up.to(dtype)
    down = _inverse(up.double(), is_mixed).float().unsqueeze(0)
    parts = zip(up.split(widths, 1), mean.float().split(widths), heads, strict=True)
    return [
        JointBasis(
            down,
            u.unflatten(1, of_layer).transpose(0, 1).unsqueeze(0).contiguous(),  # [1, Hkv, r, D]
            m.unsqueeze(0).clone() if centre else None,
        )
        for u, m, of_layer in parts
    ]


def _inverse(up, is_mixed):
    """Of `up @ upᵀ`, `[r, r]`, or of its diagonal `[r]`; directions that nothing points in get zeros."""
    if is_mixed:
        return torch.linalg.pinv(up @ up.T, rtol=1e-9, hermitian=True)
    squares = up.square().sum(1)
    return torch.where(squares > 0, 1 / squares, 0)


def _of_few_rows(chunks, width, rank, centre):
    """Directions `[W, r]`, their deviations `[r]` and the mean row, by way of the products of rows with each other."""
    rows = torch.cat(list(chunks)).double()
    n_rows = max(rows.shape[0], 1)
    mean = rows.sum(0) / n_rows
    rows = pad(rows - mean if centre else rows, (0, 0, 0, max(rank - rows.shape[0], 0)))
    values, left = torch.linalg.eigh(rows @ rows.T)
    deviation, left = values.flip(0)[:rank].clamp(min=0).sqrt(), left.flip(1)[:, :rank]
    is_real = deviation > deviation[0] * FLOOR
    vectors = rows.T @ left / deviation.where(is_real, torch.ones_like(deviation))
    return vectors * is_real, deviation / n_rows**0.5, mean


def _of_many_rows(chunks, width, rank, centre):
    """The same by way of the covariance of the channels."""
    moments = None
    for rows in chunks:
        moments = Moments(1, width, rows.device) if moments is None else moments
        moments.add(rows.unsqueeze(0))
    values, vectors = torch.linalg.eigh(moments.covariance(centre)[0])
    return vectors.flip(1)[:, :rank], values.flip(0)[:rank].clamp(min=0).sqrt(), moments.mean[0]
