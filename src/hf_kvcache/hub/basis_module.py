"""Bases of low-rank latents as weights of a repository's model."""

from __future__ import annotations

import torch
from torch import nn

from hf_kvcache.adapters.modules import CHILD, attentions
from hf_kvcache.codecs.basis import Basis


class BasisModule(nn.Module):
    """Bases of one attention module, as low-rank caches ask for them.

    Args:
        shapes: of `{k,v}_{down,up,mean}`, see `Basis`.
        rope: whether keys are projected before RoPE ("pre") or after it ("post").
    """

    def __init__(self, shapes: dict[str, list[int]], rope: str):
        super().__init__()
        self.rope = rope
        self._made: dict[str, Basis] = {}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    def basis(self, side: str) -> Basis | None:
        """Of keys ("k") or values ("v"), or None; the same object every time, so that caches share what they place."""
        held, made = getattr(self, f"{side}_down", None), self._made.get(side)
        if held is None:
            return None
        if made is None or not (held.is_meta or held.data_ptr() == made.down.data_ptr()):
            tensors = self()
            self._made[side] = Basis(*(tensors.get(f"{side}_{part}") for part in ("down", "up", "mean")))
        return self._made[side]

    def forward(self) -> dict[str, torch.Tensor]:
        """The tensors: a call, so that weights that are kept elsewhere (`device_map`) are brought for it."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def __getstate__(self):
        # what is derived from the parameters need not be copied or pickled
        return super().__getstate__() | {"_made": {}}


def add_bases(model: nn.Module, spec: dict) -> None:
    """Hang a `BasisModule` on the attention modules that `spec["shapes"]` names by layer."""
    for i, attention in attentions(model).items():
        if (shapes := spec["shapes"].get(str(i))) is not None:
            setattr(attention.module, CHILD, BasisModule(shapes, spec["rope"]))
