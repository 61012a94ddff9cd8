"""Tensor parallelism: where the weights of a model lie, and which heads that makes this process's."""

from __future__ import annotations

import torch

from hf_kvcache.shards import WHOLE, Shard


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether some weight of a module lies in several processes."""
    return any(hasattr(weight, "device_mesh") for weight in module.parameters())


def refuse_shards(model: torch.nn.Module, what: str) -> None:
    """Raise `ValueError` if a model lies in several processes, for what is done with whole weights or all heads."""
    if is_sharded(model):
        raise ValueError(f"{what} needs whole weights, and this model is shared by several processes: load it in one")


def shard_of(module: torch.nn.Module, count: int) -> Shard:
    """The share that an attention module holds, whose projections give one `count`-th of the heads.

    Found by where the weights lie (`DTensor`), which is how transformers' `tp_plan` shards a model.

    Raises:
        ValueError: the weights are not sharded among `count` processes.
    """
    if count == 1:
        return WHOLE
    for weight in module.parameters():
        mesh = getattr(weight, "device_mesh", None)
        if mesh is None:
            continue
        names = mesh.mesh_dim_names or ()
        dim = names.index("tp") if "tp" in names else 0
        if mesh.size(dim) == count:
            return Shard(mesh.get_local_rank(dim), count, mesh.get_group(dim))
    raise ValueError(
        f"layer {module.layer_idx} computes one of {count} parts of the model's heads, and its weights do not say "
        'which: caches follow tensor parallelism as from_pretrained(..., tp_plan="auto") sets it up'
    )


def shard_of_heads(module: torch.nn.Module, n_kv_heads: int) -> Shard:
    """Which part of the model's KV heads an attention module has that gives rows of `n_kv_heads` of them."""
    if n_kv_heads == 1 and getattr(module.config, "kv_lora_rank", None):
        # latents, which every process holds whole and makes its own heads of
        return WHOLE
    n_all = getattr(module.config, "num_key_value_heads", None) or n_kv_heads
    return shard_of(module, max(n_all // n_kv_heads, 1))


def clear_rows(weight: torch.Tensor, rows: list[int]) -> None:
    """Set rows of a weight to zero, of which every process may hold some; all of them must ask for it together."""
    if not hasattr(weight, "device_mesh"):
        weight[rows] = 0
        return
    from torch.distributed.tensor import distribute_tensor

    keep = torch.ones(len(weight), *[1] * (weight.dim() - 1), dtype=weight.dtype, device=weight.device)
    keep[rows] = 0
    weight.mul_(distribute_tensor(keep, weight.device_mesh, weight.placements))


def full(weight: torch.Tensor) -> torch.Tensor:
    """A weight as it is without tensor parallelism; all processes must ask for it together."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
