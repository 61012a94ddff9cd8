"""The files of a retrofit that left the base model as it is: `peft_type` "KV_DMC", one or two matrices per layer.

Tensors are called `<attention>.kv_dmc.kv_dmc_<decision | importance>`, `[Hkv, hidden]`: the weights themselves, and no
differences to others; `files` reads and writes them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from hf_kvcache.adapters import files, fit
from hf_kvcache.adapters.errors import AdapterError
from hf_kvcache.adapters.files import is_count, is_fingerprint
from hf_kvcache.adapters.modules import RETROFIT_CHILD, attentions, full_attentions
from hf_kvcache.dmc.settings import Settings

FORMAT_VERSION = 1
PEFT_TYPE = "KV_DMC"
PARTS = ("decision", "importance")
SETTINGS = tuple(Settings.__dataclass_fields__)
RATIOS = ("target_ratio", "achieved_ratio")

_BORROWED = (
    'decision="borrowed" is in the weights of the whole model, which no adapter holds: save it with '
    'hf_kvcache.dmc.save, or retrofit with decision="linear" or "rows"'
)


def settings_of(config: Mapping, where: str) -> Settings:
    """Settings of an adapter from its config.

    Raises:
        AdapterError: they are incomplete, impossible, or nothing for an adapter.
    """
    try:
        settings = Settings.from_dict({name: config.get(name) for name in SETTINGS})
    except ValueError as error:
        raise AdapterError(f"{where}: {error}") from error
    if settings.decision == "borrowed":
        raise AdapterError(f"{where}: {_BORROWED}")
    return settings


def check_config(config: Mapping, where: str) -> None:
    """Raise `AdapterError` unless a config says what an adapter must say, and nothing impossible."""

    def need(name, is_right):
        if not is_right(config.get(name)):
            raise AdapterError(f"{where}: {name}={config.get(name)!r} is damaged or missing")

    if settings_of(config, where).digest != config.get("digest"):
        raise AdapterError(f"{where} has been edited: the weights were trained for other settings, and are useless now")
    for name in ("num_kv_heads", "hidden_size"):
        need(name, is_count)
    need("layers", _are_layers)
    for name in RATIOS:
        need(name, lambda ratio: ratio is None or (type(ratio) in (int, float) and 0 < ratio < float("inf")))
    need("tokens_seen", lambda n: n is None or n == 0 or is_count(n))
    need("fingerprint", is_fingerprint)
    need("base_model_name_or_path", lambda value: isinstance(value, str | None))


def _are_layers(layers) -> bool:
    if not isinstance(layers, list) or not layers:
        return False
    return all(type(i) is int and i >= 0 for i in layers) and layers == sorted(set(layers))


def shapes(config: Mapping) -> dict[files.Place, tuple[int, ...]]:
    """Shapes of the tensors that a config speaks of, by layer and part."""
    parts = PARTS if config["method"] == "dmc" else PARTS[:1]
    return {(i, part): (config["num_kv_heads"], config["hidden_size"]) for i in config["layers"] for part in parts}


FORMAT = files.Format(
    peft_type=PEFT_TYPE,
    title="an adapter that decides for DMC or DMS",
    child=RETROFIT_CHILD,
    parts=PARTS,
    check=check_config,
    shapes=shapes,
    spoken=lambda layer_idx, part: f"{part} of layer {layer_idx}",
    version=FORMAT_VERSION,
)


def check_fit(config: Mapping, model: torch.nn.Module) -> None:
    """Raise unless an adapter of which the config is known fits a model.

    Raises:
        AdapterError: names what differs, or the layers that would be left without decisions.
    """
    settings = settings_of(config, "the adapter")

    def sizes(attention):
        yield "KV heads", config["num_kv_heads"], attention.n_kv_heads
        yield "hidden size", config["hidden_size"], attention.module.config.hidden_size

    def further(found):
        due, own = sorted(full_attentions(model)), config["layers"]
        D = next(iter(found.values())).head_dim
        problems = []
        if own != due:
            problems.append(f"layers: the adapter decides in {own}, and a cache needs decisions of {due}")
        if settings.ablates and not -D <= settings.neuron < D:
            problems.append(f"neuron: the adapter takes {settings.neuron}, the heads have {D} channels")
        return problems

    layers = config["layers"]
    known = (config.get("fingerprint") or {}).get("num_hidden_layers")
    n_layers = max(known if isinstance(known, int) else 0, max(layers) + 1)
    fit.check_fit(config, model, layers=layers, n_layers=n_layers, sizes=sizes, further=further)


def save_adapter(
    model: torch.nn.Module,
    directory: str | os.PathLike,
    *,
    target_ratio: float | None = None,
    achieved_ratio: float | None = None,
    tokens_seen: int | None = None,
) -> Path:
    """Write what `retrofit` has put on a model as a PEFT adapter, which `attach` and PEFT put on the base model.

    The base model must be as it was: its own weights are not saved. LoRA beside it is an adapter of its own.

    Args:
        model: with `Retrofit`s of "rows" or "linear" decisions; bare or wrapped by PEFT.
        directory: created if need be; an earlier adapter there is replaced, atomically.
        target_ratio, achieved_ratio, tokens_seen: of the training, for the config.

    Raises:
        AdapterError: the model is not retrofitted, or with decisions that are no adapter's.
    """
    from hf_kvcache import __version__
    from hf_kvcache.dmc.retrofitting import Retrofit

    found = full_attentions(model)
    children = {i: getattr(a.module, RETROFIT_CHILD, None) for i, a in found.items()}
    if not children or not all(isinstance(child, Retrofit) for child in children.values()):
        raise AdapterError(f"{type(model).__name__} does not have a Retrofit in all its full-attention layers")
    first = found[min(found)].module
    settings = getattr(first, RETROFIT_CHILD).settings
    if any(child.settings != settings for child in children.values()):
        raise AdapterError("the layers of the model have different settings")
    config = {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": fit.model_name(model, first),
        "format_version": FORMAT_VERSION,
        "hf_kvcache_version": __version__,
        **settings.to_dict(),
        "digest": settings.digest,
        "layers": sorted(found),
        "num_kv_heads": found[min(found)].n_kv_heads,
        "hidden_size": first.config.hidden_size,
        "fingerprint": fit.fingerprint(first),
        "target_ratio": target_ratio,
        "achieved_ratio": achieved_ratio,
        "tokens_seen": tokens_seen,
    }
    check_config(config, "the adapter")
    rows = {i: dict(zip(PARTS, child.rows())) for i, child in children.items()}
    tensors = {(i, part): t for i, own in rows.items() for part, t in own.items() if t is not None}
    return FORMAT.write(directory, config, tensors, fit.module_paths(model, attentions(model)))
