"""Key and value projections as their low-rank factors: fewer parameters and FLOPs for the same low-rank cache.

A cache that keeps `latent = (k - mean) @ down` of `k = W x + b` sees nothing else of `k`, so `W` may as well be
`up downᵀ W` (Palu, arXiv 2407.21118): the model then produces rows that lie in the subspace already.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from hf_kvcache.adapters.bases import Bases
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.modules import attentions
from hf_kvcache.codecs.basis import Basis
from hf_kvcache.sharded_model import refuse_shards


class LowRankLinear(nn.Module):
    """`y = up (down x) + bias`, `up` by group of heads.

    Args:
        in_features: `m`.
        n_groups: `G`.
        width: channels of a group, `n`; `G * n` come out.
        rank: `r`, of every group.
        bias: whether there is one.
    """

    is_decomposed = True  # the fingerprint of the original weights is gone

    def __init__(self, in_features: int, n_groups: int, width: int, rank: int, bias: bool, dtype=None, device=None):
        super().__init__()
        self.in_features, self.out_features = in_features, n_groups * width
        where = {"dtype": dtype, "device": device}
        self.down = nn.Parameter(torch.empty(n_groups * rank, in_features, **where))  # [G * r, m]
        self.up = nn.Parameter(torch.empty(n_groups, rank, width, **where))  # [G, r, n]
        self.bias = nn.Parameter(torch.empty(self.out_features, **where)) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear, basis: Basis) -> LowRankLinear:
        """The projection of everything that `linear` produces: `mean + up downᵀ (W x + b - mean)`."""
        # once per model, and in float64, which not every accelerator has
        weight = linear.weight.detach().cpu().double().unflatten(0, (basis.n_groups, -1))  # [G, n, m]
        down, mean = basis.down.to(weight), None if basis.mean is None else basis.mean.to(weight)
        up = basis.up.to(weight).transpose(1, 2).flatten(2)  # [G, r, n]
        bias = None if linear.bias is None else linear.bias.detach().cpu().double().unflatten(0, (basis.n_groups, -1))
        if mean is not None or bias is not None:
            mean = torch.zeros_like(bias) if mean is None else mean
            offset = -mean if bias is None else bias - mean  # [G, n]
            bias = mean + ((offset.unsqueeze(1) @ down) @ up).squeeze(1)
        has_bias = bias is not None
        made = cls(linear.in_features, *up.shape[::2], basis.rank, has_bias, linear.weight.dtype, linear.weight.device)
        made.requires_grad_(linear.weight.requires_grad)
        with torch.no_grad():
            made.down.copy_((down.transpose(1, 2) @ weight).flatten(0, 1))
            made.up.copy_(up)
            if has_bias:
                made.bias.copy_(bias.flatten())
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., m]` to `[..., G * n]`."""
        n_groups, rank, width = self.up.shape
        latents = nn.functional.linear(x, self.down).reshape(-1, n_groups, rank).transpose(0, 1)  # [G, tokens, r]
        if self.bias is None:
            rows = torch.bmm(latents, self.up)
        else:
            rows = torch.baddbmm(self.bias.view(n_groups, 1, width), latents, self.up)
        return rows.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        n_groups, rank, _ = self.up.shape
        return f"in_features={self.in_features}, out_features={self.out_features}, {n_groups=}, {rank=}"


def decompose(model: nn.Module, bases: Bases) -> list[dict]:
    """Replace `k_proj` and `v_proj` by their factors, in place, wherever that is exact and saves parameters.

    The model's keys and values then equal the projection of the original ones, so a low-rank cache over the same bases
    stores what it stored before. Keys are replaced only where nothing stands between the projection and the basis:
    bases of keys before RoPE, and no norm after `k_proj`.

    The factors are saved with the model (`model.save_pretrained`); `load_decomposed` puts them back on a model built
    from its config. Adapters may be attached before or after: of a decomposed model they check the shapes only.

    Returns:
        A row per projection that the bases speak of: `module` (its path), `side`, `replaced`, `reason` (why not),
        `n_parameters` and `n_parameters_before`, `flops` and `flops_before` (multiplications and additions per token).

    Raises:
        AdapterError: the bases do not fit the model; nothing has been replaced then.
        ValueError: several processes share the model.
    """
    refuse_shards(model, "decomposing")
    bases.check_model(model, weights=False)
    report = []
    for i, attention in attentions(model).items():
        for side, basis in bases.layers.get(i, {}).items():
            name = f"{side}_proj"
            linear = getattr(attention.module, name, None)
            path = f"{attention.name}.{name}".removeprefix(".")
            reason = _obstacle(attention.module, linear, basis, side, bases.rope)
            before = _size(linear) if isinstance(linear, nn.Module) else 0
            if reason is None:
                linear = LowRankLinear.of(linear, basis)
                setattr(attention.module, name, linear)
            after = before if reason is not None else _size(linear)
            report.append(
                {"module": path, "side": side, "replaced": reason is None, "reason": reason}
                | {"n_parameters": after, "n_parameters_before": before, "flops": 2 * after, "flops_before": 2 * before}
            )
    return report


def load_decomposed(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Load the state dict of a decomposed model into an ordinary one of the same config.

    Raises:
        AdapterError: the factors belong to no projection of this model.
        RuntimeError: other tensors are missing or of other shapes, as `load_state_dict` says it.
    """
    for name in [name.removesuffix(".down") for name in state_dict if name.endswith("_proj.down")]:
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise AdapterError(f"the model has no {name}, of which the state dict holds factors") from None
        down, up = state_dict[f"{name}.down"], state_dict[f"{name}.up"]
        n_groups, rank, width = up.shape
        has_bias = f"{name}.bias" in state_dict
        where = linear.weight.dtype, linear.weight.device
        parent, _, child = name.rpartition(".")
        made = LowRankLinear(down.shape[1], n_groups, width, rank, has_bias, *where)
        setattr(model.get_submodule(parent), child, made.requires_grad_(linear.weight.requires_grad))
    # a file holds tied weights once
    tied = getattr(model, "_tied_weights_keys", None) or () if model.config.tie_word_embeddings else ()
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise RuntimeError(f"the state dict lacks {missing} and has {unexpected} beside what the model has")


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _obstacle(attention, linear, basis: Basis, side: str, rope: str) -> str | None:
    """Why a projection stays as it is, or None."""
    if linear is None:
        return "the projection is fused with others"
    if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
        return f"a {type(linear).__name__} is not a plain linear layer"
    if side == "k" and rope == "post":
        return "its basis is of keys after RoPE"
    if side == "k" and getattr(attention, "k_norm", None) is not None:
        return "a norm stands between it and the basis"
    if side == "v" and getattr(attention, "v_norm", None) is not None:
        return "a norm stands between it and the basis"
    n_outputs = basis.n_groups * basis.width
    after = basis.n_groups * basis.rank * (linear.in_features + basis.width)
    before = linear.in_features * n_outputs
    return None if after < before else f"factors of rank {basis.rank} have {after} parameters, the weight has {before}"
