"""Merge attention over disjoint sets of keys by their log-sum-exp."""

from __future__ import annotations

import torch

__all__ = ["merge_states", "merge_two"]


def merge_states(states: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine partial attention outputs (Flash-Decoding, Dao et al. 2023; Online softmax, Milakov 2018).

    Args:
        states: pairs of an output `[B, Hq, S, D]`, normalised over its own keys, and the
            natural-log sum of exponentials of its scores `[B, Hq, S]` in float32, `-inf` where a query saw no key.

    Returns:
        The output over the union of the keys `[B, Hq, S, D]` in the dtype of the first output
        (zero where no key was seen at all), and its log-sum-exp `[B, Hq, S]`.
    """
    if len(states) == 1:
        return states[0]
    if len(states) == 2:
        return merge_two(*states)
    lse = torch.stack([lse for _, lse in states])  # [P, B, Hq, S]
    top = lse.amax(0).clamp(min=torch.finfo(lse.dtype).min)
    weight = torch.exp(lse - top)
    total = weight.sum(0)
    share = (weight / total.clamp(min=torch.finfo(lse.dtype).tiny)).unsqueeze(-1)  # [P, B, Hq, S, 1]
    out = sum(out.float() * part for (out, _), part in zip(states, share))
    return out.to(states[0][0].dtype), top + torch.log(total)


def merge_two(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`merge_states` of the usual two, packed rows and dense ones, in half as many steps.

    Args:
        first, second: output `[B, Hq, S, D]` and log-sum-exp `[B, Hq, S]` each.
    """
    (a, lse_a), (b, lse_b) = first, second
    # where neither saw a key both outputs are zero, and any share will do
    share = torch.sigmoid(lse_a - lse_b).nan_to_num(0.0).unsqueeze(-1)  # [B, Hq, S, 1]
    return torch.lerp(b.float(), a.float(), share).to(a.dtype), torch.logaddexp(lse_a, lse_b)
