"""Attention block by block in plain PyTorch: what the definitions of the ops of attention share."""

from __future__ import annotations

import torch


class OnlineSoftmax:
    """Attention accumulated block by block; query heads of one KV head are packed as rows.

    The arithmetic is float32 (float64 for float64 input), whatever the input.

    Args:
        q: queries `[B, Hq, S, D]`.
        n_kv_heads: `Hkv`.
        scaling: factor on the scores.
        softcap: `scores = softcap * tanh(scores / softcap)` where given (Gemma 2).
        width: channels of a value row.
    """

    def __init__(self, q, n_kv_heads, scaling, softcap, width):
        B, Hq, S, D = q.shape
        self.shape, self.n_kv_heads, self.dtype, self.softcap = (B, Hq, S), n_kv_heads, q.dtype, softcap
        self.compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        rows = Hq // n_kv_heads * S
        self.q = q.to(self.compute).reshape(B * n_kv_heads, rows, D) * scaling  # [B*Hkv, G*S, D]
        self.top = self.q.new_full((B * n_kv_heads, rows, 1), float("-inf"))
        self.total = torch.zeros_like(self.top)
        self.out = self.q.new_zeros(B * n_kv_heads, rows, width)

    def add(self, k, v, mask=None):
        """Attend over one block: `k`, `v` `[B, Hkv, n, D]`, boolean `mask` `[B|1, Hkv|1, S, n]` (True = visible)."""
        k, v = (x.to(self.compute).flatten(0, 1) for x in (k, v))
        scores = torch.bmm(self.q, k.transpose(1, 2))  # [B*Hkv, G*S, n]
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            B, Hq, S = self.shape
            scores = scores.view(B, self.n_kv_heads, -1, S, scores.shape[-1])
            scores = scores.masked_fill(~mask.unsqueeze(2), float("-inf")).view(self.q.shape[0], -1, mask.shape[-1])
        top = torch.maximum(self.top, scores.amax(-1, keepdim=True))
        # a row that has seen nothing yet keeps top = -inf: subtract 0 there, not -inf - -inf
        base = top.masked_fill(top == float("-inf"), 0.0)
        weight = torch.exp(scores - base)
        carry = torch.exp(self.top - base)
        self.total = self.total * carry + weight.sum(-1, keepdim=True)
        self.out = torch.baddbmm(self.out * carry, weight, v)
        self.top = top

    def result(self):
        """Output `[B, Hq, S, Dv]` in the dtype of q, and log-sum-exp `[B, Hq, S]` in the dtype of the arithmetic."""
        B, Hq, S = self.shape
        out = self.out / self.total.clamp(min=torch.finfo(self.compute).tiny)
        lse = self.top + torch.log(self.total)
        return out.view(B, Hq, S, -1).to(self.dtype), lse.view(B, Hq, S)
