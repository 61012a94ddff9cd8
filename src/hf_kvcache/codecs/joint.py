"""A basis for the rows of several layers together, fitted to a prompt (xKV, arXiv 2503.18893)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_kvcache.codecs.basis import Basis
from hf_kvcache.codecs.fitting import Moments, principal
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
    moments: Moments,
    heads: list[tuple[int, int]],
    rank: int,
    *,
    is_mixed: bool = False,
    centre: bool = True,
    dtype: torch.dtype = torch.float32,
) -> list[JointBasis]:
    """The principal directions of rows that the rows of several layers, side by side, make up.

    Args:
        moments: of the rows, one group.
        heads: `(Hkv, D)` of every layer, whose products add up to the width of the rows.
        rank: directions to keep.
        is_mixed: share out the energy of the leading latents (`Basis.mixed`).
        centre: around the mean row, or around zero.
        dtype: of `up`.

    Returns:
        The part of every layer.
    """
    whole, _ = principal(moments.covariance(centre), 1)
    up = whole.up[0, 0, :rank]  # [r, W]
    up = (mixing(rank, up.device).T @ up if is_mixed else up).to(dtype)
    # the inverse is that of the rounded directions, because rows are rebuilt from those
    down = _inverse(up.double(), is_mixed).float().unsqueeze(0)
    widths = [n_heads * head_dim for n_heads, head_dim in heads]
    parts = zip(up.split(widths, 1), moments.mean[0].float().split(widths), heads, strict=True)
    return [
        JointBasis(
            down,
            u.unflatten(1, of_layer).transpose(0, 1).unsqueeze(0).contiguous(),  # [1, Hkv, r, D]
            m.unsqueeze(0).clone() if centre else None,
        )
        for u, m, of_layer in parts
    ]


def _inverse(up, is_mixed):
    """Of `up @ upᵀ`, `[r, r]`, or of its diagonal, `[r]`."""
    if is_mixed:
        return torch.linalg.pinv(up @ up.T, rtol=1e-9, hermitian=True)
    return 1 / up.square().sum(1)
