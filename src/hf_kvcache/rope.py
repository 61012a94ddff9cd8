"""Rotary positions as a cache needs them: taken off keys before they are projected, put back when they are rebuilt."""

from __future__ import annotations

from typing import NamedTuple

import torch

FINE = 64  # positions that one table holds one by one; the other one goes in steps of this


class RotaryTables(NamedTuple):
    """Cosines and sines of every position up to a limit, as two small factors (the addition theorem).

    The angle of position `p` is the sum of the angles of `coarse[:, p // 64]` and `fine[:, p % 64]`, so tables for
    128K positions of 64 frequencies take 1 MiB instead of 64, and kernels keep the fine one in the nearest cache.

    Attributes:
        coarse: float32 `[2, ceil(limit / 64), R / 2]`, cosines then sines of positions 0, 64, 128, ...
        fine: float32 `[2, 64, R / 2]`, of positions 0 to 63.
    """

    coarse: torch.Tensor
    fine: torch.Tensor

    @property
    def limit(self) -> int:
        """Positions below this one are covered."""
        return self.coarse.shape[1] * FINE

    def cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, float32 `[..., R / 2]`, of integer `positions` `[...]`."""
        positions = positions.long()
        big_cos, big_sin = self.coarse[:, positions // FINE]
        cos, sin = self.fine[:, positions % FINE]
        return big_cos * cos - big_sin * sin, big_sin * cos + big_cos * sin


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first `R` channels of `x` `[..., D]`, channel `i` with `i + R / 2`; `-sin` undoes it.

    The rotation of RoFormer (arXiv 2104.09864, section 3.2.2) in the layout of Llama, where the halves are pairs.
    """
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


class Rope:
    """The rotary embedding of one kind of layer.

    Args:
        inv_freq: angle per position of every channel pair, `[R / 2]`.
        scaling: factor that the model applies to cosines and sines (YaRN, arXiv 2309.00071), to q and k alike.
        is_multimodal: whether tokens of images have positions on several axes, which are not counts of tokens.
    """

    def __init__(self, inv_freq: torch.Tensor, scaling: float = 1.0, *, is_multimodal: bool = False):
        self.inv_freq, self.scaling = inv_freq.detach().to("cpu", torch.float64), float(scaling)
        self.is_multimodal = is_multimodal
        self._tables: dict[torch.device, RotaryTables] = {}

    def cover(self, limit: int, device: torch.device) -> None:
        """Make room for positions below `limit`; tables grow in powers of two and are kept."""
        held = self._tables.get(device)
        if held is None or held.limit < limit:
            n_coarse = max(1 << (max(limit, 1) - 1).bit_length(), 4096) // FINE
            self._tables[device] = RotaryTables(self._angles(n_coarse, FINE, device), self._angles(FINE, 1, device))

    def tables(self, device: torch.device) -> RotaryTables:
        """Tables of all positions that `cover` was told of."""
        if device not in self._tables:
            self.cover(1, device)
        return self._tables[device]

    def scale_query(self, q: torch.Tensor) -> torch.Tensor:
        """Queries `[..., D]` that meet keys rotated by the tables as they would meet keys rotated by the model.

        Tables are pure rotations, so that they can be taken back by each other; the factor goes to the query.
        """
        if self.scaling == 1.0:
            return q
        q = q.clone()
        q[..., : 2 * self.inv_freq.shape[0]] *= self.scaling
        return q

    @property
    def kind(self) -> tuple:
        """What two embeddings have in common if they rotate alike."""
        return self.is_multimodal, self.scaling, *self.inv_freq.tolist()

    @property
    def nbytes(self) -> int:
        """Bytes of the angles and of all tables."""
        tables = [t for tables in self._tables.values() for t in tables]
        return sum(t.untyped_storage().nbytes() for t in [self.inv_freq, *tables])

    def _angles(self, n: int, step: int, device: torch.device) -> torch.Tensor:
        angles = torch.outer(torch.arange(n, dtype=torch.float64) * step, self.inv_freq)
        return torch.stack([angles.cos(), angles.sin()]).float().to(device)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What the model makes of keys `x` `[B, H, n, D]` at `positions` `[B, 1 | H, n]`, in float32."""
        cos, sin = self.tables(x.device).cos_sin(positions)
        return rotate(x.float(), cos * self.scaling, sin * self.scaling)

    def unrotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The keys before `rotate`, in float32."""
        cos, sin = self.tables(x.device).cos_sin(positions)
        return rotate(x.float(), cos / self.scaling, -sin / self.scaling)

    def turn(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """Keys `x` `[B, H, n, D]` as they would be `by` `[B, 1 | H, n]` positions further on, in float32."""
        cos, sin = self.tables(x.device).cos_sin(by)
        return rotate(x.float(), cos, sin)

    def __deepcopy__(self, memo) -> Rope:
        # copies of a cache belong to the same model
        return self
