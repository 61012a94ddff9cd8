"""The weights of a module as they were before any adapter was attached to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from hf_kvcache.adapters.modules import CHILDREN
from hf_kvcache.sharded_model import full


def base_parameters(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Names and parameters of a module without ours and without those that PEFT wrapped around a `base_layer`."""
    wrappers = [f"{name}." if name else "" for name, m in module.named_modules() if "base_layer" in m._modules]
    for name, parameter in module.named_parameters():
        inside = [name.removeprefix(wrapper) for wrapper in wrappers if name.startswith(wrapper)]
        if any(child in name for child in CHILDREN) or not all(rest.startswith("base_layer.") for rest in inside):
            continue
        yield name.replace("base_layer.", ""), parameter


def weights_digest(module: torch.nn.Module) -> str:
    """Fingerprint of a sample of the base weights, 32 hexadecimal digits.

    Sampled in bfloat16, so that the same model loaded in another dtype has the same one.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(base_parameters(module)):
        flat = full(parameter.detach()).flatten()
        sample = flat[:: max(flat.numel() // 256, 1)][:256].to(torch.bfloat16)
        digest.update(name.encode() + sample.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def is_readable(module: torch.nn.Module) -> bool:
    """Whether the base weights are there as numbers: not quantised, not on the meta device, not decomposed."""
    if any(getattr(m, "is_decomposed", False) for m in module.modules()):
        return False
    return all(p.is_floating_point() and not p.is_meta for _, p in base_parameters(module))
