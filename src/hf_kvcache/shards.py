"""Tensor parallelism: which of a model's KV heads a process holds, and what it must ask the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, eq=False)
class Shard:
    """One process's share of the heads: the `rank`-th of `count` equal ones, in the order of the model.

    All processes of the group must call `all_heads`, `mean` and `largest` together, as they run the model together.

    Attributes:
        rank, count: which share it is, of how many.
        group: the processes that hold the others; None when there are none.
    """

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None

    def local_shard(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This process's share of something that is there for all heads.

        Raises:
            ValueError: it cannot be shared out evenly.
        """
        if self.count == 1:
            return x
        if x.shape[dim] % self.count:
            raise ValueError(f"{x.shape[dim]} groups of heads cannot be shared out among {self.count} processes")
        return x.chunk(self.count, dim)[self.rank]

    def all_heads(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """What all processes hold of something, one after another along `dim`; their shapes must be equal."""
        if self.count == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over the processes."""
        if self.count == 1:
            return x
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total / self.count

    def largest(self, n: int, device: torch.device) -> int:
        """The largest of the numbers that the processes come with."""
        if self.count == 1:
            return n
        most = torch.tensor(n, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        return int(most)


WHOLE = Shard()


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
