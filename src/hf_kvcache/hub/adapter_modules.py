"""What a repository's model carries for its cache: modules on its attention modules, filled from its weights."""

from __future__ import annotations

from torch import nn

KINDS = ("basis", "heads", "retrofit")


def add_modules(model: nn.Module, spec: dict | None) -> None:
    """Give a model what its cache needs; the values are loaded like all its weights.

    Args:
        spec: `kind`, one of `KINDS`, and what that takes; None for nothing.

    Raises:
        ValueError: it does not describe anything of this kind.
    """
    if spec is None:
        return
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if kind == "basis":
        from hf_kvcache.hub.basis_module import add_bases as add
    elif kind == "heads":
        from hf_kvcache.hub.heads_module import add_heads as add
    elif kind == "retrofit":
        from hf_kvcache.hub.retrofit_module import add_retrofit as add
    else:
        raise ValueError(f"kv_adapter of the config is none of {', '.join(KINDS)}: {spec!r:.80}")
    add(model, spec)
