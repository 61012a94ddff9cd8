"""What saved caches of formats 1 and 2 call by other words than files of today."""

from __future__ import annotations

import torch

_FIELDS = {
    "compact": "rerotate_keys",
    "is_due": "should_evict",
    "judged_at": "last_eviction_check",
    "memory": "layer_state",
}
_TENSORS = {
    "folded": "n_merged",
    "k.taps": "k.open_segment",
    "ring": "pending",
    "rope": "position_ids",
    "v.taps": "v.open_segment",
}
_POLICIES = {"HeadSplit": "Duo"}


def manifest_of_today(raw: dict) -> dict:
    """A manifest of format 1 or 2 in the words of today; what makes no sense stays as it is."""
    now = _renamed(raw)
    if isinstance(now.get("layers"), list):
        now["layers"] = [_layer(entry) for entry in now["layers"]]
    return now | {"policy": _policy(raw.get("policy"))}


def tensors_of_today(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a file of format 1 or 2 under the names of today."""
    return {_free(_tensor(name), name, tensors): t for name, t in tensors.items()}


def _renamed(raw: dict) -> dict:
    return {_free(_FIELDS.get(name, name), name, raw): value for name, value in raw.items()}


def _free(now: str, was: str, known: dict) -> str:
    """The name of today, unless something else has it: what has a former name then is refused as unknown."""
    return was if now in known else now


def _layer(entry):
    if not isinstance(entry, dict):
        return entry
    now = _renamed(entry)
    return now | ({"n_tokens": _renamed(now["n_tokens"])} if isinstance(now.get("n_tokens"), dict) else {})


def _policy(spec):
    if not isinstance(spec, dict):
        return spec
    return {
        name: _POLICIES.get(value, value) if name == "policy" and isinstance(value, str) else _policy(value)
        for name, value in spec.items()
    }


def _tensor(name: str) -> str:
    layer, _, rest = name.partition(".")
    buffer, _, field = rest.partition(".")
    return f"{layer}.{_FIELDS.get(buffer, buffer)}.{_TENSORS.get(field, field)}" if field else name
