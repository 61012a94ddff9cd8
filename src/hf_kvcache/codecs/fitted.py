"""Codecs that go by more than a row: by a basis that the model carries, or that is fitted to the rows of a text."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_kvcache.codecs.base import Codec


class FittedCodec(Codec):
    """A codec with constants, without which its rows cannot be decoded. A chain may begin with one.

    Class attributes:
        share_layers: neighbouring layers that share a row.
        is_unfitted: whether rows have to be shown to `fitted` before any can be encoded.
        constants_in_cache: whether `constants` belong to this cache rather than to the model.
    """

    share_layers: int = 1
    is_unfitted: bool = False
    constants_in_cache: bool = False

    @property
    def fitted_part(self) -> FittedCodec:
        return self

    def with_fitted_part(self, part: Codec) -> Codec:
        return part

    def for_shape(self, n_kv_heads: int, head_dim: int) -> FittedCodec:
        """This codec for rows of this shape, where no model is at hand."""
        raise NotImplementedError

    def for_model(self, context) -> FittedCodec:
        """This codec with what it takes from the model, by a `LayerContext`, filled in."""
        raise NotImplementedError

    def alone(self) -> FittedCodec:
        """This codec without what it shares with others of its model and is given again by `for_model`."""
        return self

    def fitted(
        self, x: torch.Tensor, positions: torch.Tensor | None = None, is_real: torch.Tensor | None = None
    ) -> FittedCodec:
        """This codec fitted to rows `[B, Hkv, n, D]`; `is_real` `[B, n]` leaves out padding."""
        raise NotImplementedError

    def constants(self) -> dict[str, torch.Tensor]:
        """Tensors without which rows cannot be decoded: saved with a cache."""
        raise NotImplementedError

    def with_constants(self, tensors: dict[str, torch.Tensor]) -> FittedCodec:
        """This codec with the `constants` of another one."""
        raise NotImplementedError


def refit(codec: Codec, change: Callable[[FittedCodec], FittedCodec]) -> Codec:
    """A codec with what `change` makes of its fitted part; itself where it has none."""
    part = codec.fitted_part
    return codec if part is None else codec.with_fitted_part(change(part))


def layers_per_row(codec: Codec) -> int:
    """Neighbouring layers that share a row of this codec."""
    return 1 if codec.fitted_part is None else codec.fitted_part.share_layers
