"""Running means over segments: what a row of DMC is at every moment."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_kvcache.dmc.decisions import precise

_BLOCK = 64  # tokens whose means are one small matrix product


class Past(NamedTuple):
    """The open segment before the first token, `n` members or sums of members.

    Attributes:
        x: `[B, Hkv, n, D]`, keys and values side by side or one of them.
        weight: `[B, Hkv, n]`; zero for what is not part of the segment.
    """

    x: torch.Tensor
    weight: torch.Tensor


def merge(x: torch.Tensor, omega: torch.Tensor, p: torch.Tensor, window: int, past: Past | None = None) -> torch.Tensor:
    """The mean of the segment up to every token.

        N_t = p_t N_{t-1} + omega_t x_t,  z_t = p_t z_{t-1} + omega_t,  mean_t = N_t / z_t

    With a window only the newest `window` members count. `p` may be relaxed (training) or 0 and 1 (inference).

    Args:
        x: `[B, Hkv, S, D]`, before RoPE.
        omega: `[B, Hkv, S]`.
        p: `[B, Hkv, S]`.
        window: 0 for none.
        past: the open segment before; its newest `window - 1` members in the order of the text, or, without a window,
            the sum so far over the weight so far, as one member.

    Returns:
        Means `[B, Hkv, S, D]` in the dtype of `x`; float32 inside.
    """
    run = _scan if not window else _windowed
    # autocast would multiply in half precision
    with torch.autocast(x.device.type, enabled=False):
        return run(precise(x), precise(omega), precise(p), window, past).to(x.dtype)


def _windowed(x, omega, p, window, past):
    if past is not None:
        n = past.x.shape[2]
        x, omega = torch.cat([past.x.to(x.dtype), x], 2), torch.cat([past.weight.to(omega.dtype), omega], 2)
        p = torch.cat([torch.ones_like(p[..., :1]).expand(-1, -1, n), p], 2)
    weights = segment_weights(omega, p, window)  # [B, Hkv, S, w]
    means = _banded(weights / weights.sum(-1, keepdim=True), x)
    return means if past is None else means[:, :, n:]


def segment_weights(omega: torch.Tensor, p: torch.Tensor, window: int) -> torch.Tensor:
    """Weight of the token `d` places before every token, `C_{t,d} omega_{t-d}`: `[B, Hkv, S, window]`, newest last."""
    chain, members = torch.ones_like(p), []
    for d in range(min(window, p.shape[-1])):
        members.append(chain * _shift(omega, d))
        chain = chain * _shift(p, d)
    members = torch.stack(members[::-1], -1)
    return torch.nn.functional.pad(members, (window - members.shape[-1], 0))


def _shift(t: torch.Tensor, d: int) -> torch.Tensor:
    return t if not d else torch.nn.functional.pad(t[..., :-d], (d, 0))


def _banded(weights, x):
    """`sum_d weights[..., t, d] x[t - (w - 1) + d]`, by products of small bands."""
    *lead, S, w = weights.shape
    pad = -S % _BLOCK
    weights = torch.nn.functional.pad(weights, (0, _BLOCK, 0, pad)).unflatten(-2, (-1, _BLOCK))
    # a row that is one longer than the band shifts by one from row to row
    band = weights.flatten(-2)[..., : _BLOCK * (_BLOCK + w - 1)].unflatten(-1, (_BLOCK, _BLOCK + w - 1))
    x = torch.nn.functional.pad(x, (0, 0, w - 1, pad)).unfold(-2, _BLOCK + w - 1, _BLOCK)  # [..., n, D, b + w - 1]
    return torch.einsum("...bk,...dk->...bd", band, x).flatten(-3, -2)[..., :S, :]


def _scan(x, omega, p, window, past):
    total = torch.cat([x, torch.ones_like(x[..., :1])], -1) * omega.unsqueeze(-1)
    if past is not None:
        held = torch.cat([past.x, torch.ones_like(past.x[..., :1])], -1) * past.weight.unsqueeze(-1)
        first = total[:, :, :1] + p[..., :1, None] * held.sum(2, keepdim=True).to(total.dtype)
        total = torch.cat([first, total[:, :, 1:]], 2)
    gate, step = p.unsqueeze(-1), 1
    # doubling: after it, every token has summed up twice as many before it
    while step < x.shape[2]:
        before, gate_before = (torch.nn.functional.pad(t[:, :, :-step], (0, 0, step, 0)) for t in (total, gate))
        total, gate, step = total + gate * before, gate * gate_before, 2 * step
    return total[..., :-1] / total[..., -1:]
