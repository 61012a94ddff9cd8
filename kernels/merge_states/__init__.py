"""Merge attention over disjoint sets of keys by their log-sum-exp."""

from __future__ import annotations

import torch

__all__ = ["merge_states", "merge_two", "with_sink"]


def merge_states(states: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine partial attention outputs (Flash-Decoding, Dao et al. 2023; online softmax, arXiv 1805.02867).

    The arithmetic is float32, and float64 where an output or a log-sum-exp is.

    Args:
        states: pairs of an output `[B, Hq, S, D]`, normalised over its own keys, and the
            natural-log sum of exponentials of its scores `[B, Hq, S]` in float32 (float64 for float64 models),
            `-inf` where a query saw no key.

    Returns:
        The output over the union of the keys `[B, Hq, S, D]` in the dtype of the first output
        (zero where no key was seen at all), and its log-sum-exp `[B, Hq, S]`.
    """
    if len(states) == 1:
        return states[0]
    if len(states) == 2:
        return merge_two(*states)
    compute = _precision(*states)
    lse = torch.stack([lse.to(compute) for _, lse in states])  # [P, B, Hq, S]
    top = lse.amax(0).clamp(min=torch.finfo(compute).min)
    weight = torch.exp(lse - top)
    total = weight.sum(0)
    share = (weight / total.clamp(min=torch.finfo(compute).tiny)).unsqueeze(-1)  # [P, B, Hq, S, 1]
    out = sum(out.to(compute) * part for (out, _), part in zip(states, share))
    return out.to(states[0][0].dtype), top + torch.log(total)


def merge_two(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`merge_states` of the usual two, packed rows and dense ones, in half as many steps.

    Args:
        first, second: output `[B, Hq, S, D]` and log-sum-exp `[B, Hq, S]` each.
    """
    (a, lse_a), (b, lse_b) = first, second
    compute = _precision(first, second)
    # where neither saw a key both outputs are zero, and any share will do
    share = torch.sigmoid(lse_a.to(compute) - lse_b).nan_to_num(0.0).unsqueeze(-1)  # [B, Hq, S, 1]
    return torch.lerp(b.to(compute), a.to(compute), share).to(a.dtype), torch.logaddexp(lse_a.to(compute), lse_b)


def with_sink(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Add attention sinks: one more score per head that takes its share and gives no value (gpt-oss, OpenAI 2025).

    A sink is as one more key, whose value is zero, so it is added once, to the whole of what a query has seen. It is
    neither scaled nor capped. The arithmetic is float32, and float64 where `out` or `lse` is.

    Args:
        out: attention without sinks, normalised over its own keys, `[B, Hq, S, D]`.
        lse: natural log-sum-exp of its scores `[B, Hq, S]`, `-inf` where a query saw no key.
        sinks: score of the sink of every query head, `[Hq]`, any float dtype.

    Returns:
        The output `[B, Hq, S, D]` in the dtype of `out`, zero where no key was seen, and the log-sum-exp
        `[B, Hq, S]` over keys and sink.

    Raises:
        ValueError: there is not one sink per query head.
    """
    if sinks.shape != out.shape[1:2]:
        raise ValueError(f"sinks must be [{out.shape[1]}], one per query head, got {list(sinks.shape)}")
    compute = _precision((out, lse))
    lse, sinks = lse.to(compute), sinks.to(out.device, compute).unsqueeze(-1)  # [Hq, 1]
    # a sink of -inf where nothing was seen: any share of zeros is zero
    share = torch.sigmoid(lse - sinks).masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)  # [B, Hq, S, 1]
    return (out.to(compute) * share).to(out.dtype), torch.logaddexp(lse, sinks)


def _precision(*states) -> torch.dtype:
    """float64 where any of the states' tensors is, else float32."""
    for out, lse in states:
        if torch.float64 in (out.dtype, lse.dtype):
            return torch.float64
    return torch.float32
