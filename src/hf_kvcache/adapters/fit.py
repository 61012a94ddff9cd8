"""Whether an adapter and a model belong together, and what an adapter records of the model that it is for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from hf_kvcache.adapters import files
from hf_kvcache.adapters.base_weights import is_readable, weights_digest
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.modules import Attention, attentions, is_attention
from hf_kvcache.fingerprint import fingerprint as of_model

if TYPE_CHECKING:
    from hf_kvcache.adapters.kinds import Kind


def fingerprint(module: torch.nn.Module) -> dict | None:
    """What tells the model of an attention module from others: `fingerprint.fingerprint`, and of which layer it is.

    None where the weights cannot be read: quantised ones have no sample that could be compared with the original ones.
    """
    if not is_readable(module):
        return None
    return of_model(module) | {"layer": module.layer_idx, "weights": weights_digest(module)}


def model_name(model: torch.nn.Module, module: torch.nn.Module) -> str | None:
    """Name or path of the model that an attention module belongs to."""
    return getattr(model, "name_or_path", None) or getattr(module.config, "_name_or_path", None) or None


def module_paths(model: torch.nn.Module | None, layers: Iterable[int]) -> dict[int, str]:
    """Names of the attention modules by layer, those that a model has bare; of the usual decoder without a model."""
    if model is None:
        return {i: files.DEFAULT_PATH.format(i) for i in layers}
    return {i: a.name.replace(files.ROOT, "") for i, a in attentions(model).items()}


def known_layers(fingerprint: Mapping | None, layers: Iterable[int]) -> int:
    """Layers of a model, as far as is known: at least one more than the largest of those that an adapter is for."""
    known = (fingerprint or {}).get("num_hidden_layers")
    return max(known if isinstance(known, int) else 0, max(layers) + 1)


def check_fit(kind: Kind, config: Mapping, model: torch.nn.Module, weights: bool = True) -> None:
    """Raise unless an adapter of which the config is known fits a model, or one attention module of it.

    Args:
        kind: of the adapter.
        config: that `kind.check` has passed.
        model: the model, bare or wrapped by PEFT, or one attention module.
        weights: also compare a sample of the base weights, where they are there to be compared.

    Raises:
        AdapterError: names all that differs.
    """
    found = attentions(model)
    if not found:
        raise AdapterError(f"{type(model).__name__} has no attention modules that this adapter could belong to")
    made = config.get("fingerprint") or {}
    problems = _layer_problems(made, model, found, set(kind.layers(config))) or kind.misfits(config, model, found)
    some = next(iter(found.values()))
    problems += [
        f"{what}: the adapter is for {own}, the model has {its}"
        for what, own, its in kind.sizes(config, some)
        if own != its
    ]
    if not problems and made:
        problems = _weight_problems(made, found.get(made.get("layer")), weights)
    if problems:
        name = config.get("base_model_name_or_path")
        raise AdapterError(f"this adapter (of {name or 'an unnamed model'}) does not fit: " + "; ".join(problems))


def _layer_problems(made: Mapping, model, found: dict[int, Attention], layers: set[int]) -> list[str]:
    if is_attention(model):
        i, n_layers = model.layer_idx, known_layers(made, layers)
        return [] if i < n_layers else [f"layers: the adapter is for {n_layers}, this is layer {i}"]
    known = made.get("num_hidden_layers")
    if known is not None and known != len(found):
        return [f"layers: the adapter is for {known}, the model has {len(found)}"]
    if not layers <= found.keys():
        return [f"layers: the model has {len(found)}, the adapter is for {sorted(layers - found.keys())} beyond them"]
    return []


def _weight_problems(made: Mapping, attention: Attention | None, weights: bool) -> list[str]:
    """What differs in the layer that the fingerprint is of, if that one is among those looked at."""
    theirs = None if attention is None else fingerprint(attention.module)
    if theirs is None:
        return []
    return [
        f"{name}: the adapter is for {made[name]}, the model has {theirs[name]}"
        for name in sorted(theirs.keys() & made.keys())
        if made[name] != theirs[name] and (weights or name != "weights")
    ]
