"""Linear layers of 16 bits on CPUs without products of 16 bits, where float32 is eight times as fast (AVX2)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear


class WideLinear(nn.Linear):
    """A linear layer that multiplies in float32 and rounds the sums once, as products of 16 bits do that are built in.

    Args:
        narrow: the layer it stands for, whose parameters it shares; it holds a float32 copy beside them.
    """

    def __init__(self, narrow: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = narrow.in_features, narrow.out_features
        self.weight, self.bias = narrow.weight, narrow.bias
        self._weight = narrow.weight.detach().float()
        self._bias = None if narrow.bias is None else narrow.bias.detach().float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x.float(), self._weight, self._bias).to(x.dtype)


def widen(model: nn.Module) -> bool:
    """Replace the linear layers of a model of 16 bits on a CPU that has no products of them; says whether it did."""
    if model.device.type != "cpu" or model.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, WideLinear(module))
    return True
