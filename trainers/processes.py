"""Several processes: what a trainer can do with them."""

from __future__ import annotations

from transformers import Trainer


def refuse_fsdp(trainer: Trainer) -> None:
    """For trainers of small parts beside a frozen model, of which FSDP would shard the small parts.

    Raises:
        ValueError: the run was launched with FSDP.
    """
    if trainer.is_fsdp_enabled:
        raise ValueError(
            "only small parts beside a frozen model are trained, and FSDP would shard those alone: launch it with "
            "trainers/configs/ddp.yaml"
        )
