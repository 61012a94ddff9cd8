"""One of transformers' own layers as an entry of a manifest and named tensors, and back."""

from __future__ import annotations

import copy

import torch

from hf_kvcache.manifest import MOST_TOKENS, HFLayerEntry
from hf_kvcache.typed import Misfit, shown


def describe_hf_layer(layer) -> tuple[dict, dict[str, torch.Tensor]]:
    """One of transformers' own layers: its class, flags and numbers, and its tensors.

    Raises:
        ValueError: it holds something else.
    """
    state, tensors = numbers_and_tensors(layer, leaves(vars(layer)))
    return {"class": type(layer).__name__, "state": state}, tensors


def numbers_and_tensors(layer, held) -> tuple[dict, dict[str, torch.Tensor]]:
    """What a layer of transformers holds, `(name, value)` pairs, as values of JSON and tensors by name.

    Raises:
        ValueError: something else is among it.
    """
    state, tensors = {}, {}
    for name, value in held:
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, (bool, int)):
            state[name] = value
        elif value is not None and not isinstance(value, (torch.dtype, torch.device)):
            raise ValueError(f"a {type(layer).__name__} cannot be saved: its {name} is a {type(value).__name__}")
    return state, tensors


def restore_hf_layer(i: int, fresh, entry: HFLayerEntry, tensors: dict[str, torch.Tensor]):
    """A new layer of that class as it was described.

    Raises:
        Misfit: the class has no such state, or flags, numbers and tensors contradict each other.
    """
    layer, where = copy.deepcopy(fresh), f"layers[{i}]"
    check_leaves(dict(leaves(vars(layer))), entry.state | tensors, entry.kind, f"{where}.state")
    for name, value in (entry.state | tensors).items():
        put(vars(layer), name, value)
    _check_hf_layer(layer, entry, tensors, where)
    held = next((t for t in tensors.values() if t.is_floating_point()), None)
    if held is not None:
        layer.dtype, layer.device = held.dtype, held.device
    return layer


def check_leaves(known: dict, given: dict, kind: str, where: str) -> None:
    """Refuse state that a fresh layer, with `known`, does not have, or not of that kind."""
    for name, value in given.items():
        path = f"{where}.{shown(name)[1:-1]}"
        if name not in known:
            raise Misfit(f"{path}: a {kind} has no such state")
        before = known[name]
        if isinstance(value, torch.Tensor):
            is_like = before is None or (isinstance(before, torch.Tensor) and before.shape == value.shape)
        else:
            is_like = type(value) is type(before) or (before is None and type(value) is int)
        # numbers other than zero come from the model's config
        is_fixed = type(before) is int and before != 0
        if not is_like or (is_fixed and value != before):
            raise Misfit(f"{path}: {shown(value)} cannot stand for {shown(before)}")
        if type(value) is int and not 0 <= value <= MOST_TOKENS:
            raise Misfit(f"{path}: {value} is no number of tokens")


def check_flag(state: dict, flag: str, name: str, tensors: dict, where: str) -> None:
    """Refuse a flag that says of the tensor `name` what is not so in the file."""
    if bool(state.get(flag)) != (name in tensors):
        raise Misfit(f"{where}.{flag}: {state.get(flag)}, where {name} is {name in tensors} in the file")


def _check_hf_layer(layer, entry: HFLayerEntry, tensors: dict, where: str) -> None:
    flags = {"is_initialized": "keys"}
    for kind in ("conv", "recurrent"):
        of_kind = getattr(layer, f"is_{kind}_states_initialized", {})
        flags |= {f"is_{kind}_states_initialized.{i}": f"{kind}_states.{i}" for i in of_kind}
    for flag, name in flags.items():
        check_flag(entry.state, flag, name, tensors, f"{where}.state")
    keys, values = tensors.get("keys"), tensors.get("values")
    if (keys is None) != (values is None):
        raise Misfit(f"{where}: keys or values are missing")
    if keys is not None and (keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]):
        raise Misfit(f"{where}: keys {list(keys.shape)} and values {list(values.shape)} are not [B, Hkv, N, D]")
    n_seen = entry.state.get("cumulative_length")
    window = getattr(layer, "sliding_window", None)
    if keys is None or n_seen is None or window is None:
        return
    if not min(n_seen, window - 1) <= keys.shape[2] <= n_seen:
        raise Misfit(f"{where}.state.cumulative_length: {n_seen}, where the file holds {keys.shape[2]} rows")


def leaves(attributes: dict):
    """What a layer holds by name, entries of dictionaries as `name.key`."""
    for name, value in attributes.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", item) for key, item in value.items())
        else:
            yield name, value


def put(attributes: dict, path: str, value) -> None:
    """Set what `leaves` calls `path`."""
    name, _, key = path.partition(".")
    if key:
        attributes[name][int(key)] = value
    else:
        attributes[name] = value
