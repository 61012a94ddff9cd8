"""Tensor parallelism: one process's share of a model's KV heads, and what it must ask the others."""

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
