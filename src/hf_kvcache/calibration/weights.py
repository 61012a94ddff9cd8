"""The weights that produce keys and values."""

from __future__ import annotations

import torch


def projection_parameter(module: torch.nn.Module, side: str) -> tuple[torch.nn.Parameter, slice]:
    """The parameter that holds the key ("k") or value ("v") projection of an attention module, and which of its rows.

    Raises:
        ValueError: the module has neither separate projections nor `qkv_proj`.
    """
    own = getattr(module, f"{side}_proj", None)
    if own is not None:
        return own.weight, slice(None)
    fused = getattr(module, "qkv_proj", None)
    if fused is None:
        raise ValueError(f"{type(module).__name__} has neither {side}_proj nor qkv_proj")
    n_kv = module.config.num_key_value_heads * module.head_dim
    end = fused.weight.shape[0] - (n_kv if side == "k" else 0)
    return fused.weight, slice(end - n_kv, end)


def projection_weight(module: torch.nn.Module, side: str) -> torch.Tensor:
    """Weight of the key or value projection, `[Hkv * D, hidden]`, float32."""
    parameter, rows = projection_parameter(module, side)
    return parameter.detach()[rows].float()


class WeightGradients:
    """Root mean square of the gradient of every projection weight over samples (Palu, arXiv 2407.21118).

    Args:
        modules: attention modules by layer.
    """

    def __init__(self, modules: dict[int, torch.nn.Module]):
        self._where = {(i, side): projection_parameter(m, side) for i, m in modules.items() for side in "kv"}
        self._squares = {key: torch.zeros((), dtype=torch.float32) for key in self._where}
        self._count = 0

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What has to get gradients."""
        return list({id(parameter): parameter for parameter, _ in self._where.values()}.values())

    def add(self) -> None:
        """Count the gradients of one sample, and clear them."""
        self._count += 1
        for key, (parameter, rows) in self._where.items():
            self._squares[key] = self._squares[key] + parameter.grad[rows].float().cpu().square()
        for parameter in self.parameters:
            parameter.grad = None

    def score(self, layer_idx: int, side: str) -> float:
        """Mean over the entries of a weight."""
        return float((self._squares[layer_idx, side] / self._count).sqrt().mean())


def condition_number(weight: torch.Tensor) -> float:
    """Largest over smallest singular value."""
    values = torch.linalg.svdvals(weight.double())
    return float(values[0] / values[-1].clamp(min=torch.finfo(torch.float64).tiny))
