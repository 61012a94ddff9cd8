"""Retaining heads as weights of a repository's model (Locret, arXiv 2410.01805)."""

from __future__ import annotations

import torch
from torch import nn

from hf_kvcache.adapters.capture import Capture
from hf_kvcache.adapters.modules import RETAIN_CHILD, attentions
from hf_kvcache.adapters.projections import sources
from hf_kvcache.adapters.scoring import score_in_blocks


class HeadsModule(nn.Module):
    """Retaining heads of one attention module, as policies ask for them.

    Args:
        shapes: of `fc1` `[d_r, F]` and `fc2` `[Hkv, d_r]`.
        attention: the module; hooks on its projections keep their outputs while it runs.
        activation, feature_point: see `RetainingHeads`.
    """

    is_active = True

    def __init__(self, shapes: dict[str, list[int]], attention: nn.Module, activation: str, feature_point: str):
        super().__init__()
        self.activation, self._sources = activation, sources(attention, feature_point)
        self._capture = Capture(self._names)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))
        self._capture.hang(attention, self._sources)

    def scores(self) -> torch.Tensor:
        """How much later tokens will look at every token of the current call, float32 `[B, Hkv, S]`."""
        parts, shard = self._capture.parts_of_all_heads(self.fc1.shape[1])
        fc1, fc2 = self()
        return score_in_blocks(parts, fc1, shard.local_shard(fc2, 0), self.activation)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both weights: a call, so that weights that are kept elsewhere (`device_map`) are brought for it."""
        return self.fc1, self.fc2

    def _names(self) -> dict[str, str]:
        return self._sources


def add_heads(model: nn.Module, spec: dict) -> None:
    """Hang a `HeadsModule` on the attention modules that `spec["shapes"]` names by layer."""
    for i, attention in attentions(model).items():
        if (shapes := spec["shapes"].get(str(i))) is not None:
            knobs = spec["activation"], spec["feature_point"]
            setattr(attention.module, RETAIN_CHILD, HeadsModule(shapes, attention.module, *knobs))
