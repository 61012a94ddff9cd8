"""What a retrofit is trained for: a ratio that rises, a hinge that asks for it, a teacher to stay close to."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hf_kvcache.dmc.hooks import Call


def ramp(step: int, n_steps: int, ratio: float, start: float = 1.0) -> float:
    """The compression ratio asked for at a step: linear from `start` to `ratio` over `n_steps`, then constant."""
    return start + (ratio - start) * min(1.0, step / n_steps) if n_steps else ratio


def straight_through(call: Call) -> torch.Tensor:
    """Decisions of a call, hard ones forward and relaxed ones backward, `[B, Hkv, S]`.

    Forward they are those of the noisy draw, as attention has seen them.

    Raises:
        RuntimeError: the decisions have no gradient though gradients are enabled.
    """
    p = call.p.to(call.logits.dtype)
    if torch.is_grad_enabled() and not p.requires_grad:
        raise RuntimeError(
            "decisions carry no gradient: the model is in eval mode, nothing that decides is trained, or gradient "
            'checkpointing is reentrant (use gradient_checkpointing_kwargs={"use_reentrant": False})'
        )
    return (p > 0.5).to(p.dtype) + p - p.detach()


def merged_share(calls: dict[int, Call]) -> torch.Tensor:
    """Share of real tokens that do not get, or keep, a row: `[B, L, Hkv]`, straight through."""
    shares = []
    for call in calls.values():
        alpha = straight_through(call)
        real = None if call.is_real is None else call.is_real.unsqueeze(1).to(alpha.dtype)
        shares.append(alpha.mean(-1) if real is None else (alpha * real).sum(-1) / real.sum(-1).clamp(min=1))
    return torch.stack(shares, 1)


def hinge(share: torch.Tensor, ratio: float, is_constant: bool = False) -> torch.Tensor:
    """How far a batch stays behind a compression ratio: `max(0, 1 - 1/ratio - share)`, never asking for less.

    Args:
        share: from `merged_share`, `[B, L, Hkv]`.
        ratio: tokens per row asked for.
        is_constant: of every head by itself (DMC-C), instead of all together.
    """
    wanted = 1 - 1 / ratio
    share = share if is_constant else share.mean((1, 2))
    return (wanted - share).clamp(min=0).mean()


def divergence(student: torch.Tensor, teacher: torch.Tensor, direction: str = "reverse") -> torch.Tensor:
    """KL divergence between next-token distributions, float32 `[...]`.

    Args:
        student, teacher: logits `[..., V]`.
        direction: "reverse" is KL(student || teacher), what the released DMS code computes; "forward" the other one.
    """
    student, teacher = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    p, q = (student, teacher) if direction == "reverse" else (teacher, student)
    return (p.exp() * (p - q)).sum(-1)


def distillation(
    student: torch.Tensor, teacher: torch.Tensor, direction: str = "reverse", keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean of `divergence` over the places that count.

    Args:
        student, teacher, direction: see `divergence`.
        keep: which places count, `[...]`; None for all.
    """
    kl = divergence(student, teacher, direction)
    return kl.mean() if keep is None else (kl * keep).sum() / keep.sum().clamp(min=1)
