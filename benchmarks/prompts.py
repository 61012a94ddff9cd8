"""Attention of a prompt in one layer: our op against sdpa, on whole prompts, padded ones and chunks of longer ones."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_kvcache.bench.timing import interleaved
from hf_kvcache.kernels.prompt_attention import prompt_attention

SHAPES = {
    "SmolLM2-135M": {"heads": 9, "kv_heads": 3, "head_dim": 64},
    "Llama-3.1-8B": {"heads": 32, "kv_heads": 8, "head_dim": 128},
}
# tokens of the call, tokens before it, padding in front
CALLS = {"whole": (2048, 0, 0), "padded": (2048, 0, 100), "chunk": (1024, 3072, 0)}
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4, torch.float16: 5e-3}


def prompts(options) -> list[dict]:
    """Every shape, call and dtype; both must agree before anything is timed."""
    return [
        _row(options, shape, call, dtype)
        for shape in SHAPES
        for call in CALLS
        for dtype in DTYPES
        if not (options.device == "cuda" and dtype == torch.float32)
    ]


def _row(options, shape: str, call: str, dtype: torch.dtype) -> dict:
    sizes, (n_new, n_before, n_padding) = SHAPES[shape], CALLS[call]
    generator, n = torch.Generator(options.device).manual_seed(0), n_new + n_before

    def rows(heads, n):
        made = torch.randn(1, heads, n, sizes["head_dim"], generator=generator, device=options.device)
        return made.to(dtype)

    q, k, v = rows(sizes["heads"], n_new), rows(sizes["kv_heads"], n), rows(sizes["kv_heads"], n)
    is_real = (torch.arange(n, device=options.device) >= n_padding)[None] if n_padding else None
    mask = None
    if n_padding or n_before:
        mask = torch.ones(n_new, n, dtype=torch.bool, device=options.device).tril(n_before)[None, None]
        mask = mask if is_real is None else mask & is_real[:, None, None]
    scaling = sizes["head_dim"] ** -0.5
    calls = {
        "ours": lambda: prompt_attention(q, k, v, scaling=scaling, is_real=is_real)[0],
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True),
    }
    ours, theirs = (run()[:, :, n_padding:].float() for run in calls.values())
    wrong = (ours - theirs).abs().max().item()
    if not wrong < TOLERANCE[dtype]:
        raise AssertionError(f"{shape}, {call}, {dtype}: differs from sdpa by {wrong:.3g}; nothing was timed")
    times = interleaved(calls, options.rounds, options.device)
    return {
        "shape": shape,
        "call": call,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": n_new,
        "before": n_before,
        "ms": times["ours"]["ms"],
        "sdpa ms": times["sdpa"]["ms"],
        "x sdpa": times["sdpa"]["ms"] / times["ours"]["ms"],
    }
